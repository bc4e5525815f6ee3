// SPDX-License-Identifier: Apache-2.0
// One optimizer step of a list of tensors on a CPU: decode, rule, write, encode, a block at a time.
//
// `RULE`, `MOMENTS` and the constants in capitals come from Python. The definitions are `lowbits.optim`'s, and the
// results are theirs bit for bit: compile without contraction. The loops are plain, for the compiler to vectorise.
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, DYNAMIC8, UDYNAMIC8, CODEBOOK4 };
enum { FIRST, PARAMETER, P_KIND, GRADIENT, G_KIND, NUMEL, BLOCK, SCALARS, FACTOR, STOCHASTIC, KEY0, KEY1, STEP, HEAD };
enum { DATA, KIND, SCALE, TABLE, STEPS, MOMENT_COLUMNS };
// What TABLE points to: what each code stands for; for 4 bits also the largest number of each code but the last, the
// format's largest value and its code of 0.
enum { BOUNDS = 16, MAX = 31, ZERO = 32 };
enum { COLUMNS = HEAD + MOMENTS * MOMENT_COLUMNS, BLOCKS_AT_ONCE = 32 };
// Elements of the largest block, and some: buffers a multiple of 4096 bytes apart would share cache lines.
enum { LARGEST = 4096 + 272 };

static inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static void rule(int n, float *restrict p, const float *restrict g, float *const *m, const float *restrict h) {
    RULE
}

// --- floats ----------------------------------------------------------------------------------------------------------

// Float32 is worked on in place: copies of a thousand bytes cost more than the whole rule.
static float *load(float *restrict buffer, int64_t from, int64_t kind, int64_t first, int n) {
    if (kind == FLOAT32) return (float *)from + first;
    const uint16_t *restrict x = (const uint16_t *)from + first;
    for (int i = 0; i < n; i++) buffer[i] = float_of((uint32_t)x[i] << 16);
    return buffer;
}

static void store(int64_t to, const float *restrict x, int64_t kind, int64_t first, int n) {
    if (kind == FLOAT32) return;
    uint16_t *restrict out = (uint16_t *)to + first;
    for (int i = 0; i < n; i++) {  // to the nearest, ties to even; NaN stays NaN
        uint32_t bits = bits_of(x[i]), rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        out[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
}

// Round to bfloat16 with the bits of `Noise.bits16`: Philox4x32-10, whose 128 bits serve 8 elements.
static void round_stochastically(float *restrict x, int64_t key0, int64_t key1, int64_t step, int64_t first, int n) {
    uint32_t word[4][LARGEST / 8];
    int counters = (n + 7) / 8;
    for (int i = 0; i < counters; i++) {
        uint64_t index = (uint64_t)(first / 8 + i);
        uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = (uint32_t)step, c3 = 0;
        uint32_t k0 = (uint32_t)key0, k1 = (uint32_t)key1;
        for (int round = 0; round < 10; round++) {
            uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
            c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        word[0][i] = c0, word[1][i] = c1, word[2][i] = c2, word[3][i] = c3;
    }
    for (int i = 0; i < n; i++) {
        uint32_t bits = bits_of(x[i]), noise = (word[i / 2 % 4][i / 8] >> (i % 2 * 16)) & 0xFFFF;
        uint32_t rounded = (bits + noise) & 0xFFFF0000u;
        x[i] = float_of((bits & 0x7F800000) == 0x7F800000 ? bits : rounded);
    }
}

// --- codes -----------------------------------------------------------------------------------------------------------

static void decode(float *restrict out, const uint8_t *restrict codes, const float *restrict points, float scale, int n) {
    for (int i = 0; i < n; i++) out[i] = points[codes[i]] * scale;
}

static float scale_of(const float *restrict x, int n) {
    int32_t largest = 0;  // by bits, so that NaN counts as the largest
    for (int i = 0; i < n; i++) {
        int32_t bits = (int32_t)(bits_of(x[i]) & 0x7FFFFFFF);
        largest = bits > largest ? bits : largest;
    }
    float amax = float_of((uint32_t)largest);
    return amax > 0 && amax < SMALLEST_SCALE ? SMALLEST_SCALE : amax;
}

// Where codes end stands in STEPS, by the leading bits of the number: an entry holds the code of the smallest number that
// begins with them, and in its lower bits what carries into the next code when the number's other bits are added.
static void encode_signed(uint8_t *restrict codes, const float *restrict x, const int32_t *restrict steps, float inverse, int n) {
    for (int i = 0; i < n; i++) {
        int32_t key = (int32_t)bits_of(x[i] * inverse);
        key ^= (key >> 31) & 0x7FFFFFFF;  // in the order of the numbers
        codes[i] = (uint8_t)(((key & 0x1FFFF) + steps[key >> 17]) >> 17);
    }
}

static void encode_unsigned(uint8_t *restrict codes, const float *restrict x, const int32_t *restrict steps, float inverse, int n) {
    for (int i = 0; i < n; i++) {
        int32_t key = (int32_t)bits_of(x[i] * inverse);
        codes[i] = (uint8_t)(((key & 0xFFFF) + steps[key >> 16]) >> 16);
    }
}

// Two codes a byte, the even element's in the low bits.
static void decode4(float *restrict out, const uint8_t *restrict codes, const float *restrict table, float scale, int n) {
    for (int i = 0; i < n; i++) out[i] = table[(codes[i / 2] >> (i % 2 * 4)) & 15] * scale;
}

static void encode4(uint8_t *restrict codes, const float *restrict x, const float *restrict table, float inverse, int n) {
    uint8_t code[LARGEST];
    const float max = table[MAX];
    const int32_t zero = (int32_t)table[ZERO];
#pragma omp simd
    for (int i = 0; i < n; i++) {
        float y = x[i] * inverse * max;
        int32_t above = 0;
        for (int k = 0; k < 15; k++) above += y > table[BOUNDS + k];
        code[i] = (uint8_t)(y == y ? above : zero);
    }
    code[n] = 0;  // fills up the last byte
    for (int i = 0; i < (n + 1) / 2; i++) codes[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
}

static void decode_block(float *restrict out, const int64_t *moment, int64_t block, int64_t first, int n) {
    const float *table = (const float *)moment[TABLE], scale = ((const float *)moment[SCALE])[block];
    const uint8_t *codes = (const uint8_t *)moment[DATA];
    if (moment[KIND] == CODEBOOK4) decode4(out, codes + first / 2, table, scale, n);
    else decode(out, codes + first, table, scale, n);
}

static void encode_block(const float *restrict x, const int64_t *moment, int64_t block, int64_t first, int n) {
    float scale = scale_of(x, n), inverse = scale > 0 ? 1 / scale : 0;
    uint8_t *codes = (uint8_t *)moment[DATA];
    ((float *)moment[SCALE])[block] = scale;
    const int32_t *steps = (const int32_t *)moment[STEPS];
    if (moment[KIND] == DYNAMIC8) encode_signed(codes + first, x, steps, inverse, n);
    else if (moment[KIND] == UDYNAMIC8) encode_unsigned(codes + first, x, steps, inverse, n);
    else encode4(codes + first / 2, x, (const float *)moment[TABLE], inverse, n);
}

// --- the step --------------------------------------------------------------------------------------------------------

static void update_block(const int64_t *row, int64_t block) {
    float buffer[2 + MOMENTS][LARGEST];
    int64_t first = block * row[BLOCK], left = row[NUMEL] - first;
    int n = (int)(left < row[BLOCK] ? left : row[BLOCK]);
    float factor = float_of((uint32_t)row[FACTOR]), *m[MOMENTS + 1];
    float *p = load(buffer[0], row[PARAMETER], row[P_KIND], first, n);
    float *g = load(buffer[1], row[GRADIENT], row[G_KIND], first, n);
    if (factor != 1) {
        for (int i = 0; i < n; i++) buffer[1][i] = g[i] * factor;
        g = buffer[1];
    }
    for (int k = 0; k < MOMENTS; k++) {
        const int64_t *moment = row + HEAD + k * MOMENT_COLUMNS;
        m[k] = buffer[2 + k];
        if (moment[KIND] <= BFLOAT16) m[k] = load(m[k], moment[DATA], moment[KIND], first, n);
        else decode_block(m[k], moment, block, first, n);
    }
    rule(n, p, g, m, (const float *)row[SCALARS]);
    if (row[STOCHASTIC]) round_stochastically(p, row[KEY0], row[KEY1], row[STEP], first, n);
    store(row[PARAMETER], p, row[P_KIND], first, n);
    for (int k = 0; k < MOMENTS; k++) {
        const int64_t *moment = row + HEAD + k * MOMENT_COLUMNS;
        if (moment[KIND] <= BFLOAT16) store(moment[DATA], m[k], moment[KIND], first, n);
        else encode_block(m[k], moment, block, first, n);
    }
}

// `rows`: COLUMNS for each of `tensors`, addresses and sizes, FIRST being the number of blocks in the rows before it;
// `blocks`: of all of them.
void update(const int64_t *rows, int64_t tensors, int64_t blocks, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t chunk = 0; chunk < (blocks + BLOCKS_AT_ONCE - 1) / BLOCKS_AT_ONCE; chunk++) {
        int64_t block = chunk * BLOCKS_AT_ONCE, end = block + BLOCKS_AT_ONCE < blocks ? block + BLOCKS_AT_ONCE : blocks;
        int64_t low = 0, high = tensors - 1;
        while (low < high) {
            int64_t middle = (low + high + 1) / 2;
            if (rows[middle * COLUMNS + FIRST] <= block) low = middle; else high = middle - 1;
        }
        for (; block < end; block++) {
            while (low + 1 < tensors && block >= rows[(low + 1) * COLUMNS + FIRST]) low++;
            update_block(rows + low * COLUMNS, block - rows[low * COLUMNS + FIRST]);
        }
    }
}
