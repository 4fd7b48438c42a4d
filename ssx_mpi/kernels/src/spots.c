/* Strong pixels by the dispersion of counts; the mathematics is described in ssx_mpi/kernels/spots.py. */
#include "common.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE_VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define WIDE_VECTORS
#endif

/* DIALS leaves pixels from 2^24 on out of every sum */
#define TOO_BIG (1 << 24)
/* DIALS widens the window by so many pixels on each side for the final threshold */
#define EXTENSION 2

/* what `state` tells of a pixel */
enum { DISPERSED = 1, SIGNAL = 2 };
/* tests: overdispersed; above the mean without signal; overdispersed and above the mean at once */
enum { DISPERSION, FINAL, STRONG };

struct geometry {
    int64_t ny, nx, ky, kx;
};

struct criteria {
    double gain, n_sigma_background, n_sigma_strong, threshold;
    int64_t min_count;
    int extended, erode_beside_masked;
};

/* one row of each: sums over columns and over windows */
struct sums {
    double *column_m, *column_x, *column_y, *m, *x, *y;
};

/* Of the listed dispersed pixels keep, and mark as signal, those without background in the square around them. */
static int64_t erode(const uint8_t *mask, uint8_t *state, const struct geometry *g, int beside_masked, int32_t *list,
                     int64_t n)
{
    const int64_t d = (g->ky < g->kx ? g->ky : g->kx) - 1;
    int64_t kept = 0;
    for (int64_t l = 0; l < n; l++) {
        const int64_t k = list[l], row = k / g->nx, column = k % g->nx;
        const int64_t top = row - d > 0 ? row - d : 0, bottom = row + d < g->ny - 1 ? row + d : g->ny - 1;
        const int64_t left = column - d > 0 ? column - d : 0, right = column + d < g->nx - 1 ? column + d : g->nx - 1;
        int inside = 1;
        for (int64_t j = top; inside && j <= bottom; j++)
            for (int64_t q = j * g->nx + left; q <= j * g->nx + right; q++)
                inside &= (state[q] & DISPERSED) || (!beside_masked && !mask[q]);
        if (inside) {
            state[k] |= SIGNAL;
            list[kept++] = (int32_t)k;
        }
    }
    return kept;
}

#define PIXEL int32_t
#define NAME(x) x##_int32
#include "spots_windows.h"
#undef PIXEL
#undef NAME
#define PIXEL double
#define NAME(x) x##_float64
#include "spots_windows.h"
#undef PIXEL
#undef NAME

/* Counts, sums and sums of squares of one column when a row enters (sign 1) or leaves (-1) the window. A pixel beyond
 * `cap` adds 2^16 to the count instead: its square would not fit. */
static inline __attribute__((always_inline)) void move_row(const int32_t *restrict v, const uint8_t *restrict mask,
                                                           int64_t nx, int32_t cap, int32_t sign, int32_t *restrict m,
                                                           int32_t *restrict x, int32_t *restrict y)
{
    for (int64_t i = 0; i < nx; i++) {
        const int32_t value = mask[i] ? v[i] : 0;
        const int32_t big = (value > cap) | (value < -cap);
        const int32_t small = big ? 0 : value;
        m[i] += sign * ((int32_t)mask[i] + (big << 16));
        x[i] += sign * small;
        y[i] += sign * small * small;
    }
}

/* Where the window centred on each pixel of a row may be overdispersed. m, x, y start at column -kx and are 0 outside. */
static inline __attribute__((always_inline)) void suspect_row(int64_t nx, int64_t kx, float gain, float n_sigma,
                                                              const int32_t *restrict m, const int32_t *restrict x,
                                                              const int32_t *restrict y, const uint8_t *restrict mask,
                                                              uint8_t *restrict suspect)
{
    for (int64_t i = 0; i < nx; i++) {
        int32_t sm = 0, sx = 0, sy = 0;
        for (int64_t d = 0; d <= 2 * kx; d++) {
            sm += m[i + d];
            sx += x[i + d];
            sy += y[i + d];
        }
        const float fm = (float)(sm & 0xffff), fx = (float)sx, fy = (float)sy;
        const float excess = fm * fy - fx * fx;
        const float limit = gain * fx * (fm - 1.0f + n_sigma * sqrtf(2.0f * fabsf(fm - 1.0f)));
        /* far more than single precision can lose in these few operations */
        const float margin = 4e-6f * (fm * fy + fx * fx + fabsf(limit));
        suspect[i] = mask[i] & ((sm > 0xffff) | (excess - limit + margin > 0.0f));
    }
}

/* List the valid pixels that may pass the dispersion test; returns how many. `rows` holds 3 * (nx + 2 kx) zeros and
 * `suspect` nx + 8 bytes. */
WIDE_VECTORS
static int64_t suspects(const int32_t *image, const uint8_t *mask, const struct geometry *g, const struct criteria *c,
                        int32_t *rows, uint8_t *suspect, int32_t *list)
{
    const int64_t nx = g->nx, padded = nx + 2 * g->kx;
    const int32_t cap = (int32_t)sqrt((double)INT32_MAX / (double)((2 * g->ky + 1) * (2 * g->kx + 1)));
    int32_t *m = rows, *x = rows + padded, *y = rows + 2 * padded;
    const float gain = (float)c->gain, n_sigma = (float)c->n_sigma_background;
    int64_t n = 0;

    memset(suspect + nx, 0, 8);
    for (int64_t j = 0; j < g->ny + g->ky; j++) {
        if (j < g->ny)
            move_row(image + j * nx, mask + j * nx, nx, cap, 1, m + g->kx, x + g->kx, y + g->kx);
        const int64_t old = j - 2 * g->ky - 1, row = j - g->ky;
        if (old >= 0)
            move_row(image + old * nx, mask + old * nx, nx, cap, -1, m + g->kx, x + g->kx, y + g->kx);
        if (row < 0)
            continue;
        if (g->kx == 3)
            suspect_row(nx, 3, gain, n_sigma, m, x, y, mask + row * nx, suspect);
        else
            suspect_row(nx, g->kx, gain, n_sigma, m, x, y, mask + row * nx, suspect);
        for (int64_t i = 0; i < nx; i += 8) {
            uint64_t word;
            memcpy(&word, suspect + i, 8);
            if (word)
                for (int64_t q = i; q < i + 8; q++)
                    if (suspect[q])
                        list[n++] = (int32_t)(row * nx + q);
        }
    }
    return n;
}

/* List all valid pixels; returns how many. */
static int64_t all_valid(const uint8_t *mask, int64_t n_pixels, int32_t *list)
{
    int64_t n = 0;
    for (int64_t k = 0; k < n_pixels; k++)
        if (mask[k])
            list[n++] = (int32_t)k;
    return n;
}

static struct sums sums_of(double *windows, int64_t nx)
{
    const struct sums sums = {windows,          windows + nx,     windows + 2 * nx,
                              windows + 3 * nx, windows + 4 * nx, windows + 5 * nx};
    return sums;
}

/* Strong pixels, as their places in raster order in `list`; returns how many.
 * Work space: rows (3 * (nx + 2 kx)), suspect (nx + 8), windows (6 * nx), state (ny * nx), list (ny * nx). */
int64_t ssx_dispersion_int32(const int32_t *image, const uint8_t *mask, int64_t ny, int64_t nx, int64_t ky, int64_t kx,
                             double gain, double n_sigma_background, double n_sigma_strong, double threshold,
                             int64_t min_count, int extended, int erode_beside_masked, int32_t *rows, uint8_t *suspect,
                             double *windows, uint8_t *state, int32_t *list)
{
    const struct geometry g = {ny, nx, ky, kx};
    const struct criteria c = {gain, n_sigma_background, n_sigma_strong, threshold, min_count, extended,
                               erode_beside_masked};
    const struct sums sums = sums_of(windows, nx);
    int64_t n;
    /* sums over larger windows would not fit the 16 bits of the count */
    if ((2 * ky + 1) * (2 * kx + 1) < 1 << 12) {
        memset(rows, 0, (size_t)(3 * (nx + 2 * kx)) * sizeof *rows);
        n = suspects(image, mask, &g, &c, rows, suspect, list);
    } else
        n = all_valid(mask, ny * nx, list);
    return threshold_int32(image, mask, &g, &c, state, &sums, list, n);
}

int64_t ssx_dispersion_float64(const double *image, const uint8_t *mask, int64_t ny, int64_t nx, int64_t ky, int64_t kx,
                               double gain, double n_sigma_background, double n_sigma_strong, double threshold,
                               int64_t min_count, int extended, int erode_beside_masked, double *windows,
                               uint8_t *state, int32_t *list)
{
    const struct geometry g = {ny, nx, ky, kx};
    const struct criteria c = {gain, n_sigma_background, n_sigma_strong, threshold, min_count, extended,
                               erode_beside_masked};
    const struct sums sums = sums_of(windows, nx);
    return threshold_float64(image, mask, &g, &c, state, &sums, list, all_valid(mask, ny * nx, list));
}

/* Valid pixels within the trusted range, both ends included. */
#define TRUSTED(NAME, PIXEL)                                                                                           \
    void NAME(const PIXEL *raw, const uint8_t *valid, int64_t n, double lowest, double highest, uint8_t *mask)         \
    {                                                                                                                  \
        for (int64_t k = 0; k < n; k++)                                                                                \
            mask[k] = (uint8_t)(valid[k] & (raw[k] >= lowest) & (raw[k] <= highest));                                  \
    }

TRUSTED(ssx_trusted_float64, double)

WIDE_VECTORS
void ssx_trusted_int32(const int32_t *raw, const uint8_t *valid, int64_t n, int32_t lowest, int32_t highest,
                       uint8_t *mask)
{
    for (int64_t k = 0; k < n; k++)
        mask[k] = (uint8_t)(valid[k] & (raw[k] >= lowest) & (raw[k] <= highest));
}
