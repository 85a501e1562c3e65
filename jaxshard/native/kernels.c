/* Passes over memory that NumPy makes one after the other, or in short calls.

   Plain C99 without Python in it: called through ctypes, which lets other threads work meanwhile.
   Sizes are counted in elements, distances between rows in bytes. Nothing is allocated; what is
   needed on the way is each thread's own. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define LEAST(a, b) ((a) < (b) ? (a) : (b))

/* Python compares it with its own: raised with every change of a function below. */
int jaxshard_kernels(void) { return 1; }

/* -- Turning -------------------------------------------------------------------------------

   out[r][c] = in[c][r], by tiles. The rows of a tile are copied side by side first, a little
   apart, as the rows of a tensor are often a power of two apart and share cache lines then. */

enum { TILE_ROWS = 256, TILE_BYTES = 1024, APART = 64 };

static _Thread_local char tile[TILE_ROWS * (TILE_BYTES + APART)];

typedef uint16_t eight_of_2 __attribute__((vector_size(16)));
typedef uint32_t four_of_4 __attribute__((vector_size(16)));

#define LOAD(value, from) memcpy(&(value), from, sizeof(value))
#define STORE(to, value) memcpy(to, &(value), sizeof(value))

ALWAYS void turn_8x8_of_1(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row) {
    uint64_t a[8];
    for (int k = 0; k < 8; k++) LOAD(a[k], in + k * in_row);
    static const uint64_t mask[3] = {0xffffffffu, 0x0000ffff0000ffffu, 0x00ff00ff00ff00ffu};
    for (int step = 0; step < 3; step++) { /* halves of ever smaller blocks change places */
        int side = 4 >> step, bits = 32 >> step;
        for (int k = 0; k < 8; k++) {
            if (k & side) continue;
            uint64_t x = a[k], y = a[k + side];
            a[k] = (x & mask[step]) | (y & mask[step]) << bits;
            a[k + side] = (x >> bits & mask[step]) | (y & mask[step] << bits);
        }
    }
    for (int k = 0; k < 8; k++) STORE(out + k * out_row, a[k]);
}

ALWAYS void turn_8x8_of_2(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row) {
    eight_of_2 a[8], b[8];
    for (int k = 0; k < 8; k++) LOAD(a[k], in + k * in_row);
    for (int step = 0; step < 3; step++) { /* interleaved with the one four rows on, three times */
        for (int k = 0; k < 4; k++) {
            b[2 * k] = __builtin_shufflevector(a[k], a[k + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * k + 1] = __builtin_shufflevector(a[k], a[k + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        for (int k = 0; k < 8; k++) a[k] = b[k];
    }
    for (int k = 0; k < 8; k++) STORE(out + k * out_row, a[k]);
}

ALWAYS void turn_4x4_of_4(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row) {
    four_of_4 a[4], b[4];
    for (int k = 0; k < 4; k++) LOAD(a[k], in + k * in_row);
    for (int step = 0; step < 2; step++) {
        for (int k = 0; k < 2; k++) {
            b[2 * k] = __builtin_shufflevector(a[k], a[k + 2], 0, 4, 1, 5);
            b[2 * k + 1] = __builtin_shufflevector(a[k], a[k + 2], 2, 6, 3, 7);
        }
        for (int k = 0; k < 4; k++) a[k] = b[k];
    }
    for (int k = 0; k < 4; k++) STORE(out + k * out_row, a[k]);
}

ALWAYS void turn_singly(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row, size_t rows,
                        size_t columns, size_t item) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++)
            memcpy(out + (ptrdiff_t)r * out_row + c * item, in + (ptrdiff_t)c * in_row + r * item, item);
}

#define TURNS_TILES_OF(ITEM, SIDE, TURN_BLOCK)                                                    \
    static void turn_tile_of_##ITEM(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row,     \
                                    size_t rows, size_t columns) {                                \
        size_t r = 0, whole = columns - columns % SIDE;                                           \
        for (; r + SIDE <= rows; r += SIDE) {                                                     \
            for (size_t c = 0; c < whole; c += SIDE)                                              \
                TURN_BLOCK(out + (ptrdiff_t)r * out_row + c * ITEM, out_row, in + (ptrdiff_t)c * in_row + r * ITEM,     \
                           in_row);                                                               \
            turn_singly(out + (ptrdiff_t)r * out_row + whole * ITEM, out_row, in + (ptrdiff_t)whole * in_row + r * ITEM, \
                        in_row, SIDE, columns - whole, ITEM);                                     \
        }                                                                                         \
        turn_singly(out + (ptrdiff_t)r * out_row, out_row, in + r * ITEM, in_row, rows - r, columns, ITEM);  \
    }

TURNS_TILES_OF(1, 8, turn_8x8_of_1)
TURNS_TILES_OF(2, 8, turn_8x8_of_2)
TURNS_TILES_OF(4, 4, turn_4x4_of_4)

/* out: rows x columns elements of `item` bytes (1, 2 or 4); in: columns x rows. */
void turn(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row, size_t rows,
          size_t columns, size_t item) {
    const size_t high = TILE_BYTES / item;
    const ptrdiff_t tile_row = TILE_BYTES + APART;
    for (size_t c = 0; c < columns; c += TILE_ROWS) {
        size_t wide = LEAST(columns - c, (size_t)TILE_ROWS);
        for (size_t r = 0; r < rows; r += high) {
            size_t some = LEAST(rows - r, high);
            for (size_t k = 0; k < wide; k++)
                memcpy(tile + (ptrdiff_t)k * tile_row, in + (ptrdiff_t)(c + k) * in_row + r * item,
                       some * item);
            char *to = out + (ptrdiff_t)r * out_row + c * item;
            switch (item) {
            case 1: turn_tile_of_1(to, out_row, tile, tile_row, some, wide); break;
            case 2: turn_tile_of_2(to, out_row, tile, tile_row, some, wide); break;
            case 4: turn_tile_of_4(to, out_row, tile, tile_row, some, wide); break;
            }
        }
    }
}

/* -- Casts ---------------------------------------------------------------------------------

   bfloat16 is the first half of a float32. To the nearest, a tie to the even one; a NaN becomes
   the quiet one of its sign. */

ALWAYS float widened(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof(wide));
    return wide;
}

ALWAYS uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint32_t quiet = (bits >> 16 & 0x8000) | 0x7fc0;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest);
}

FOR_EACH_PROCESSOR
void bf16_to_f32(float *restrict out, const uint16_t *restrict in, size_t count) {
    for (size_t i = 0; i < count; i++) out[i] = widened(in[i]);
}

FOR_EACH_PROCESSOR
void f32_to_bf16(uint16_t *restrict out, const float *restrict in, size_t count) {
    for (size_t i = 0; i < count; i++) out[i] = rounded(in[i]);
}

/* -- Adapters ------------------------------------------------------------------------------

   out = in + scaling * (b @ a) in float32, rounded once. A few rows of a strip of columns at a
   time: the sums of four rows stay in registers, and the strip of `a` in the nearest cache. */

enum { ROWS = 4, STRIP = 256, LANES = 8, MOST_RANK = 256 };

static _Thread_local float strip_of_a[MOST_RANK * STRIP];

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float lanes_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* sums[r][c] = sum over k of b[r][k] * a[k][c], for up to ROWS rows and STRIP columns */
ALWAYS void products(float *restrict sums, const float *b, size_t b_row, size_t rows,
                     size_t columns, size_t rank) {
    size_t c = 0;
    for (; rows == ROWS && c + 2 * LANES <= columns; c += 2 * LANES) {
        const float *a = strip_of_a + c, *b1 = b + b_row, *b2 = b1 + b_row, *b3 = b2 + b_row;
        lanes s0 = {0}, t0 = s0, s1 = s0, t1 = s0, s2 = s0, t2 = s0, s3 = s0, t3 = s0;
        for (size_t k = 0; k < rank; k++, a += STRIP) {
            lanes x = *(const lanes_anywhere *)a, y = *(const lanes_anywhere *)(a + LANES);
            s0 += b[k] * x, t0 += b[k] * y;
            s1 += b1[k] * x, t1 += b1[k] * y;
            s2 += b2[k] * x, t2 += b2[k] * y;
            s3 += b3[k] * x, t3 += b3[k] * y;
        }
        lanes_anywhere *to = (lanes_anywhere *)(sums + c);
        to[0] = s0, to[1] = t0;
        to += STRIP / LANES, to[0] = s1, to[1] = t1;
        to += STRIP / LANES, to[0] = s2, to[1] = t2;
        to += STRIP / LANES, to[0] = s3, to[1] = t3;
    }
    for (; c < columns; c++)
        for (size_t r = 0; r < rows; r++) {
            float sum = 0;
            for (size_t k = 0; k < rank; k++) sum += b[r * b_row + k] * strip_of_a[k * STRIP + c];
            sums[r * STRIP + c] = sum;
        }
}

/* What is in `memory` is rounded to float32 there: no multiplication before it may be fused with
   an addition after it, or results would depend on the processor, and differ from NumPy's. */
#define ROUNDED_BY_NOW(memory) __asm__ volatile("" : : "r"(memory) : "memory")

/* in and out: rows x columns; b: rows x rank; a: rank x columns; rank up to MOST_RANK. */
FOR_EACH_PROCESSOR
void add_product_to_bf16(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row,
                         const float *b, size_t b_row, const float *a, size_t a_row, size_t rows,
                         size_t columns, size_t rank, float scaling) {
    float sums[ROWS * STRIP];
    for (size_t c = 0; c < columns; c += STRIP) {
        size_t wide = LEAST(columns - c, (size_t)STRIP);
        for (size_t k = 0; k < rank; k++)
            memcpy(strip_of_a + k * STRIP, a + k * a_row + c, wide * sizeof(float));
        for (size_t r = 0; r < rows; r += ROWS) {
            size_t high = LEAST(rows - r, (size_t)ROWS);
            products(sums, b + r * b_row, b_row, high, wide, rank);
            ROUNDED_BY_NOW(sums);
            for (size_t k = 0; k < high; k++) {
                const uint16_t *from = (const uint16_t *)(in + (ptrdiff_t)(r + k) * in_row) + c;
                uint16_t *to = (uint16_t *)(out + (ptrdiff_t)(r + k) * out_row) + c;
                float *sum = sums + k * STRIP;
                if (scaling != 1) {
                    for (size_t i = 0; i < wide; i++) sum[i] *= scaling;
                    ROUNDED_BY_NOW(sums);
                }
                for (size_t i = 0; i < wide; i++) to[i] = rounded(widened(from[i]) + sum[i]);
            }
        }
    }
}
