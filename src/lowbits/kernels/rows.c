// SPDX-License-Identifier: Apache-2.0
// Quantize a matrix to int8 along both of its axes on a CPU: largest magnitudes in one read, both copies in another.
//
// The definition is `lowbits.quantizers`', and the results are its bit for bit: compile without contraction. The loops
// are plain, for the compiler to vectorise.
#include <stdint.h>
#include <string.h>

enum { SIDE = 64 };  // of a tile: its codes turn round within the first cache

static inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static void load(float *restrict out, const void *from, int64_t bfloat16, int64_t first, int n) {
    if (!bfloat16) {
        memcpy(out, (const float *)from + first, 4 * (size_t)n);
        return;
    }
    const uint16_t *restrict x = (const uint16_t *)from + first;
    for (int i = 0; i < n; i++) out[i] = float_of((uint32_t)x[i] << 16);
}

// x [rows, columns]: the bits of the largest magnitude of each row and column, NaN the largest; `of_columns` were 0.
void amax(const void *x, int64_t bfloat16, int64_t rows, int64_t columns, int64_t stride, uint32_t *of_rows,
          uint32_t *of_columns, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t block = 0; block < (columns + 511) / 512; block++) {  // a thread has its own columns
        int64_t first = block * 512;
        int n = columns - first < 512 ? (int)(columns - first) : 512;
        float v[512];
        uint32_t largest[512];
        memset(largest, 0, sizeof largest);
        for (int64_t r = 0; r < rows; r++) {
            load(v, x, bfloat16, r * stride + first, n);
            uint32_t row = 0;
            for (int i = 0; i < n; i++) {
                uint32_t bits = bits_of(v[i]) & 0x7FFFFFFF;
                largest[i] = largest[i] > bits ? largest[i] : bits;
                row = row > bits ? row : bits;
            }
            of_rows[block * rows + r] = row;  // one row of `of_rows` a block of columns
        }
        memcpy(of_columns + first, largest, 4 * (size_t)n);
    }
}

// Divide by (or multiply with) a scale and round to nearest even: 1.5 * 2^23 leaves the integer in the lowest bits.
static inline int8_t code(float y) { return (int8_t)(uint8_t)(bits_of(y + 12582912.0f) & 0xFF); }

// codes_k [rows, width_k] under a divisor a row, codes_r [columns, width_r] under a divisor a column; 0 for neither.
void quantize(const void *x, int64_t bfloat16, int64_t rows, int64_t columns, int64_t stride, const float *by_rows,
              int8_t *codes_k, int64_t width_k, const float *by_columns, int8_t *codes_r, int64_t width_r,
              int64_t multiplies_k, int64_t multiplies_r, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t block = 0; block < (rows + SIDE - 1) / SIDE; block++) {
        int64_t top = block * SIDE;
        int height = rows - top < SIDE ? (int)(rows - top) : SIDE;
        for (int64_t left = 0; left < columns; left += SIDE) {
            int n = columns - left < SIDE ? (int)(columns - left) : SIDE;
            int8_t turned[SIDE][SIDE];
            for (int r = 0; r < height; r++) {
                float v[SIDE];
                load(v, x, bfloat16, (top + r) * stride + left, n);
                if (codes_k) {
                    int8_t *restrict out = codes_k + (top + r) * width_k + left;
                    float by = by_rows[top + r];
                    if (multiplies_k) for (int i = 0; i < n; i++) out[i] = code(v[i] * by);
                    else for (int i = 0; i < n; i++) out[i] = code(v[i] / by);
                }
                if (codes_r) {
                    const float *restrict by = by_columns + left;
                    if (multiplies_r) for (int i = 0; i < n; i++) turned[r][i] = code(v[i] * by[i]);
                    else for (int i = 0; i < n; i++) turned[r][i] = code(v[i] / by[i]);
                }
            }
            if (codes_r)
                for (int i = 0; i < n; i++)
                    for (int r = 0; r < height; r++) codes_r[(left + i) * width_r + top + r] = turned[r][i];
        }
    }
}

// out[m, n] = sums[m, n] a[m] b[n], to float32 or bfloat16; a stride of 0 takes one scale for all.
void scale(const int32_t *sums, const float *a, int64_t stride_a, const float *b, int64_t stride_b, void *out,
           int64_t bfloat16, int64_t rows, int64_t columns, int64_t stride, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t r = 0; r < rows; r++) {
        const int32_t *restrict from = sums + r * stride;
        float by = a[r * stride_a];
        if (!bfloat16) {
            float *restrict to = (float *)out + r * columns;
            for (int64_t i = 0; i < columns; i++) to[i] = (float)from[i] * by * b[i * stride_b];
            continue;
        }
        uint16_t *restrict to = (uint16_t *)out + r * columns;
        for (int64_t i = 0; i < columns; i++) {  // to the nearest, ties to even; NaN stays NaN
            uint32_t bits = bits_of((float)from[i] * by * b[i * stride_b]);
            uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
            to[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
        }
    }
}
