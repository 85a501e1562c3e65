/* Passes over memory that NumPy makes one after the other, or in short calls.

   Plain C without Python in it: called through ctypes, which lets other threads work meanwhile.
   Sizes are counted in elements, distances between rows in bytes. What is needed on the way is each
   thread's own, half a megabyte. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* Where the C library can choose between versions of a function when it is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#define LANES 8
#else
#define FOR_EACH_PROCESSOR
#define LANES 4
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define LEAST(a, b) ((a) < (b) ? (a) : (b))

/* Python compares it with its own: raised with every change of a function below. */
int jaxshard_kernels(void) { return 2; }

/* -- Turning -------------------------------------------------------------------------------

   out[r][c] = in[c][r], by tiles. The rows of a tile are copied side by side first, a little
   apart, as the rows of a tensor are often a power of two apart and share cache lines then. */

enum { TILE_ROWS = 256, TILE_BYTES = 1024, LINE = 64, TILE_ROW = TILE_BYTES + LINE };

static _Thread_local _Alignas(LINE) char tile[TILE_ROWS * TILE_ROW];

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
            b[2 * k] = SHUFFLED(eight_of_2, a[k], a[k + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * k + 1] = SHUFFLED(eight_of_2, a[k], a[k + 4], 4, 12, 5, 13, 6, 14, 7, 15);
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
            b[2 * k] = SHUFFLED(four_of_4, a[k], a[k + 2], 0, 4, 1, 5);
            b[2 * k + 1] = SHUFFLED(four_of_4, a[k], a[k + 2], 2, 6, 3, 7);
        }
        for (int k = 0; k < 4; k++) a[k] = b[k];
    }
    for (int k = 0; k < 4; k++) STORE(out + k * out_row, a[k]);
}

ALWAYS void turn_singly(char *out, ptrdiff_t out_row, const char *in, size_t rows, size_t columns,
                        size_t item) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++)
            memcpy(out + (ptrdiff_t)r * out_row + c * item, in + c * TILE_ROW + r * item, item);
}

#define TURNS_TILES_OF(ITEM, SIDE, TURN_BLOCK)                                                    \
    static void turn_tile_of_##ITEM(char *out, ptrdiff_t out_row, size_t rows, size_t columns) {  \
        const char *in = tile;                                                                    \
        size_t r = 0;                                                                             \
        for (; r + SIDE <= rows; r += SIDE, out += SIDE * out_row, in += SIDE * ITEM) {           \
            size_t c = 0;                                                                         \
            for (; c + SIDE <= columns; c += SIDE)                                                \
                TURN_BLOCK(out + c * ITEM, out_row, in + c * TILE_ROW, TILE_ROW);                 \
            turn_singly(out + c * ITEM, out_row, in + c * TILE_ROW, SIDE, columns - c, ITEM);     \
        }                                                                                         \
        turn_singly(out, out_row, in, rows - r, columns, ITEM);                                   \
    }

TURNS_TILES_OF(1, 8, turn_8x8_of_1)
TURNS_TILES_OF(2, 8, turn_8x8_of_2)
TURNS_TILES_OF(4, 4, turn_4x4_of_4)

ALWAYS void take_tile(const char *in, ptrdiff_t in_row, size_t rows, size_t row_bytes) {
    char *to = tile;
    for (size_t k = 0; k < rows; k++)
        memcpy(to + k * TILE_ROW, in + (ptrdiff_t)k * in_row, row_bytes);
}

/* Where the result is not read soon, its cache lines go past the caches: they are not fetched only
   to be overwritten. They are made whole, a block of a line a side at a time. */

ALWAYS void stream_line(char *to, const char *line) {
#if defined(__SSE2__)
    for (int k = 0; k < LINE; k += 16)
        _mm_stream_si128((__m128i *)(to + k), _mm_load_si128((const __m128i *)(line + k)));
#else
    memcpy(to, line, LINE);
#endif
}

#define TURNS_LINES_OF(ITEM, SIDE, TURN_BLOCK)                                                    \
    static void turn_lines_of_##ITEM(char *out, ptrdiff_t out_row, size_t rows, size_t columns) { \
        enum { ACROSS = LINE / ITEM };                                                            \
        const char *in = tile;                                                                    \
        for (size_t r = 0; r < rows; r += ACROSS, out += ACROSS * out_row, in += LINE)            \
            for (size_t c = 0; c < columns; c += ACROSS) {                                        \
                _Alignas(LINE) char lines[ACROSS][LINE];                                          \
                const char *from = in + c * TILE_ROW;                                             \
                for (int i = 0; i < ACROSS; i += SIDE)                                            \
                    for (int k = 0; k < ACROSS; k += SIDE)                                        \
                        TURN_BLOCK(lines[i] + k * ITEM, LINE, from + k * TILE_ROW + i * ITEM,     \
                                   TILE_ROW);                                                     \
                for (int k = 0; k < ACROSS; k++)                                                  \
                    stream_line(out + k * out_row + c * ITEM, lines[k]);                          \
            }                                                                                     \
    }

TURNS_LINES_OF(1, 8, turn_8x8_of_1)
TURNS_LINES_OF(2, 8, turn_8x8_of_2)
TURNS_LINES_OF(4, 4, turn_4x4_of_4)

/* `streamed`: past the caches; then rows and columns are whole lines. */
static void turn_by_tiles(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row,
                          size_t rows, size_t columns, size_t item, int streamed) {
    const size_t high = TILE_BYTES / item;
    for (size_t c = 0; c < columns; c += TILE_ROWS) {
        size_t wide = LEAST(columns - c, (size_t)TILE_ROWS);
        for (size_t r = 0; r < rows; r += high) {
            size_t some = LEAST(rows - r, high);
            take_tile(in + (ptrdiff_t)c * in_row + r * item, in_row, wide, some * item);
            char *to = out + (ptrdiff_t)r * out_row + c * item;
            switch (streamed ? -(int)item : (int)item) {
            case 1: turn_tile_of_1(to, out_row, some, wide); break;
            case 2: turn_tile_of_2(to, out_row, some, wide); break;
            case 4: turn_tile_of_4(to, out_row, some, wide); break;
            case -1: turn_lines_of_1(to, out_row, some, wide); break;
            case -2: turn_lines_of_2(to, out_row, some, wide); break;
            case -4: turn_lines_of_4(to, out_row, some, wide); break;
            }
        }
    }
#if defined(__SSE2__)
    if (streamed) _mm_sfence();
#endif
}

/* out: rows x columns elements of `item` bytes (1, 2 or 4); in: columns x rows. `is_final`: what
   is written will not be read soon. */
void turn(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row, size_t rows,
          size_t columns, size_t item, int is_final) {
    size_t across = LINE / item, high = rows - rows % across, wide = columns - columns % across;
    if (!is_final || ((uintptr_t)out | (uintptr_t)out_row) % LINE) high = wide = 0;
    turn_by_tiles(out, out_row, in, in_row, high, wide, item, 1);
    if (!high || !wide) high = 0, wide = columns; /* then all of it is below the rows done */
    turn_by_tiles(out + wide * item, out_row, in + (ptrdiff_t)wide * in_row, in_row, high,
                  columns - wide, item, 0);
    turn_by_tiles(out + (ptrdiff_t)high * out_row, out_row, in + high * item, in_row, rows - high,
                  columns, item, 0);
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

   out = in + scaling * (b @ a) in float32, rounded once. A strip of the columns of `a` lies in the
   nearest cache; the sums of four rows of two vectors stay in registers until they are added.

   The halves of a vector are widened and narrowed within each 16 bytes of it, as processors do
   that best. Where vectors are longer, the strip has its columns in that order, too. */

enum { ROWS = 4, STEP = 2 * LANES, STRIP = 256, MOST_RANK = 256 };

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(4 * LANES)));

#if LANES == 8
#define QUADS {0, 8, 4, 12}
#define LOW(z, v) \
    SHUFFLED(halves, z, v, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27)
#define HIGH(z, v) \
    SHUFFLED(halves, z, v, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31)
#define ODD(x, y) \
    SHUFFLED(halves, x, y, 1, 3, 5, 7, 17, 19, 21, 23, 9, 11, 13, 15, 25, 27, 29, 31)
#else
#define QUADS {0, 4}
#define LOW(z, v) SHUFFLED(halves, z, v, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(z, v) SHUFFLED(halves, z, v, 4, 12, 5, 13, 6, 14, 7, 15)
#define ODD(x, y) SHUFFLED(halves, x, y, 1, 3, 5, 7, 9, 11, 13, 15)
#endif

static _Thread_local _Alignas(64) float strip_of_a[MOST_RANK * STRIP];

/* `wide` columns of `a`, filled up with zeros to whole steps, each in the order of LOW and HIGH */
ALWAYS void take_strip(const float *a, size_t a_row, size_t rank, size_t wide) {
    static const int order[STEP / 4] = QUADS;
    for (size_t k = 0; k < rank; k++) {
        const float *from = a + k * a_row;
        for (size_t i = 0; i < wide; i += STEP) {
            float some[STEP] = {0}, *to = strip_of_a + k * STRIP + i;
            memcpy(some, from + i, LEAST(wide - i, (size_t)STEP) * sizeof(float));
            for (int quad = 0; quad < STEP / 4; quad++)
                memcpy(to + 4 * quad, some + order[quad], 16);
        }
    }
}

/* As `rounded`, in the upper half of each. */
ALWAYS words rounded_words(lanes value) {
    words bits = (words)value;
    words nearest = bits + 0x7fff + (bits >> 16 & 1);
    words quiet = (bits & 0x80000000u) | 0x7fc00000u;
    return nearest ^ ((nearest ^ quiet) & (words)(value != value));
}

/* A step of elements: out = in + scaling * (x and y, in the order of HIGH and LOW) */
ALWAYS void add_step(char *out, const char *in, lanes x, lanes y, float scaling) {
    if (scaling != 1) {
        x *= scaling, y *= scaling;
        /* rounded by now, as in NumPy: fused with the addition, it would not be */
        __asm__ volatile("" : "+m"(x), "+m"(y));
    }
    halves stored, zero = {0};
    LOAD(stored, in);
    words low = rounded_words((lanes)LOW(zero, stored) + x);
    words high = rounded_words((lanes)HIGH(zero, stored) + y);
    stored = ODD((halves)low, (halves)high);
    STORE(out, stored);
}

/* `rows` rows (up to ROWS), of a strip the columns from `first` to `end`, in whole steps */
ALWAYS void add_to_rows(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row,
                        const float *b, size_t b_row, size_t rows, size_t rank, size_t first,
                        size_t end, float scaling) {
    const size_t last = rows - 1; /* a row that is not there is the last one again */
    const float *b1 = b + LEAST(last, (size_t)1) * b_row, *b2 = b + LEAST(last, (size_t)2) * b_row;
    const float *b3 = b + last * b_row;
    for (size_t i = first; i < end; i += STEP, in += 2 * STEP, out += 2 * STEP) {
        const lanes *a = (const lanes *)(strip_of_a + i);
        lanes x0 = {0}, y0 = x0, x1 = x0, y1 = x0, x2 = x0, y2 = x0, x3 = x0, y3 = x0;
        for (size_t k = 0; k < rank; k++, a += STRIP / LANES) {
            lanes x = a[0], y = a[1];
            x0 += b[k] * x, y0 += b[k] * y;
            x1 += b1[k] * x, y1 += b1[k] * y;
            x2 += b2[k] * x, y2 += b2[k] * y;
            x3 += b3[k] * x, y3 += b3[k] * y;
        }
        add_step(out, in, x0, y0, scaling);
        if (rows > 1) add_step(out + out_row, in + in_row, x1, y1, scaling);
        if (rows > 2) add_step(out + 2 * out_row, in + 2 * in_row, x2, y2, scaling);
        if (rows > 3) add_step(out + 3 * out_row, in + 3 * in_row, x3, y3, scaling);
    }
}

/* in and out, which may be the same: rows x columns; b: rows x rank; a: rank x columns. */
FOR_EACH_PROCESSOR
void add_product_to_bf16(char *out, ptrdiff_t out_row, const char *in, ptrdiff_t in_row,
                         const float *b, size_t b_row, const float *a, size_t a_row, size_t rows,
                         size_t columns, size_t rank, float scaling) {
    for (size_t c = 0; c < columns; c += STRIP) {
        size_t wide = LEAST(columns - c, (size_t)STRIP), whole = wide - wide % STEP;
        take_strip(a + c, a_row, rank, wide);
        for (size_t r = 0; r < rows; r += ROWS) {
            const char *from = in + (ptrdiff_t)r * in_row + 2 * c;
            char *to = out + (ptrdiff_t)r * out_row + 2 * c;
            size_t high = LEAST(rows - r, (size_t)ROWS), rest = 2 * (wide - whole);
            if (high == ROWS)
                add_to_rows(to, out_row, from, in_row, b + r * b_row, b_row, ROWS, rank, 0, whole,
                            scaling);
            else
                add_to_rows(to, out_row, from, in_row, b + r * b_row, b_row, high, rank, 0, whole,
                            scaling);
            if (rest) { /* in a place of its own: nothing beyond the rows is touched */
                char some[ROWS][2 * STEP] = {{0}};
                for (size_t k = 0; k < high; k++)
                    memcpy(some[k], from + (ptrdiff_t)k * in_row + 2 * whole, rest);
                add_to_rows(some[0], 2 * STEP, some[0], 2 * STEP, b + r * b_row, b_row, high, rank,
                            whole, whole + STEP, scaling);
                for (size_t k = 0; k < high; k++)
                    memcpy(to + (ptrdiff_t)k * out_row + 2 * whole, some[k], rest);
            }
        }
    }
}
