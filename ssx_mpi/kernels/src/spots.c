/* Strong pixels by the dispersion of counts; the mathematics is described in ssx_mpi/kernels/spots.py. */
#include "common.h"

/* DIALS leaves pixels from 2^24 on out of every sum */
#define TOO_BIG (1 << 24)
/* DIALS widens the window by so many pixels on each side for the final threshold */
#define EXTENSION 2
/* more than any count of pixels in a window */
#define MANY (1 << 16)

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

/* List all valid pixels; returns how many. */
static int64_t all_valid(const uint8_t *mask, size_t n_pixels, int32_t *list)
{
    int64_t n = 0;
    for (size_t k = 0; k < n_pixels; k++)
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

#define PIXEL int32_t
#define NAME(x) x##_int32
/* sums of squares of smaller values fit */
#define CAP(n_window) ((int32_t)sqrt((double)INT32_MAX / (double)(n_window)))
#define DRIFT 0.0f
#include "spots_windows.h"
#undef PIXEL
#undef NAME
#undef CAP
#undef DRIFT
#define PIXEL double
#define NAME(x) x##_float64
/* a running sum of squares remembers of larger values what rounding lost */
#define CAP(n_window) 4096.0
/* and so it does, down the rows of a panel, of the smaller ones */
#define DRIFT 0.25f
#include "spots_windows.h"

static int64_t root_of(int32_t *parent, int64_t l)
{
    while (parent[l] != l) {
        parent[l] = parent[parent[l]];
        l = parent[l];
    }
    return l;
}

static void join(int32_t *parent, int64_t a, int64_t b)
{
    a = root_of(parent, a);
    b = root_of(parent, b);
    if (a < b)
        parent[b] = (int32_t)a;
    else
        parent[a] = (int32_t)b;
}

/* Keep of the `n` listed pixels (in raster order) those in groups of `smallest` to `largest` pixels that share edges;
 * returns how many. Work space: parent (n), size (n). */
int64_t ssx_groups_of_size(int32_t *list, int64_t n, int64_t nx, int64_t smallest, int64_t largest, int32_t *parent,
                           int32_t *size)
{
    for (int64_t l = 0, above = 0; l < n; l++) {
        parent[l] = (int32_t)l;
        size[l] = 0;
        if (l > 0 && list[l - 1] == list[l] - 1 && list[l] % nx != 0)
            join(parent, l, l - 1);
        while (list[above] < list[l] - nx)
            above++;
        if (list[above] == list[l] - nx)
            join(parent, l, above);
    }
    for (int64_t l = 0; l < n; l++)
        size[root_of(parent, l)]++;
    int64_t kept = 0;
    for (int64_t l = 0; l < n; l++) {
        const int64_t n_pixels = size[root_of(parent, l)];
        if (n_pixels >= smallest && n_pixels <= largest)
            list[kept++] = list[l];
    }
    return kept;
}

/* pixels after which a count moves on to a wider one */
#define BLOCK 4096

/* Valid pixels within the trusted range, both ends included; returns how many valid ones are above it. */
#define TRUSTED(NAME, PIXEL, LIMIT)                                                                                    \
    int64_t NAME(const PIXEL *raw, const uint8_t *valid, int64_t n, LIMIT lowest, LIMIT highest, uint8_t *mask)        \
    {                                                                                                                  \
        int64_t above = 0;                                                                                             \
        for (int64_t start = 0; start < n; start += BLOCK) {                                                           \
            const int64_t stop = start + BLOCK < n ? start + BLOCK : n;                                                \
            int32_t some = 0;                                                                                          \
            for (int64_t k = start; k < stop; k++) {                                                                   \
                mask[k] = (uint8_t)(valid[k] & (raw[k] >= lowest) & (raw[k] <= highest));                              \
                some += valid[k] & (raw[k] > highest);                                                                 \
            }                                                                                                          \
            above += some;                                                                                             \
        }                                                                                                              \
        return above;                                                                                                  \
    }

TRUSTED(ssx_trusted_float64, double, double)

WIDE
TRUSTED(ssx_trusted_int32, int32_t, int32_t)

/* The mean of sampled pixels in each bin of `scale` * x, and of all of them, without those above a bin's mean by more
 * than `n_sigma` of its spread, which are spots. means, counts: (n_bins); the last bin takes what lies beyond. */
double ssx_background(const double *value, const uint8_t *valid, const float *x, int64_t n, double scale,
                      double readout, double n_sigma, int64_t n_passes, int64_t n_bins, int32_t *bin, double *limit,
                      double *means, double *counts)
{
    const float factor = (float)scale, last = (float)(n_bins - 1);
    double total = 0.0, n_counted = 0.0;
    for (int64_t i = 0; i < n; i++) {
        const float place = factor * x[i];
        bin[i] = (int32_t)(place < last ? place : last);
    }
    for (int64_t b = 0; b < n_bins; b++)
        limit[b] = HUGE_VAL;
    for (int64_t pass = 0; pass < n_passes; pass++) {
        for (int64_t b = 0; b < n_bins; b++)
            means[b] = counts[b] = 0.0;
        for (int64_t i = 0; i < n; i++) {
            const int counted = valid[i] & (value[i] <= limit[bin[i]]);
            means[bin[i]] += counted ? value[i] : 0.0;
            counts[bin[i]] += counted;
        }
        for (int64_t b = 0; b < n_bins; b++) {
            if (pass == n_passes - 1) {
                total += means[b];
                n_counted += counts[b];
            }
            means[b] = counts[b] > 0 ? means[b] / counts[b] : 0.0;
            limit[b] = means[b] + n_sigma * sqrt((means[b] > 0 ? means[b] : 0.0) + readout) + 1.0;
        }
    }
    return n_counted > 0 ? total / n_counted : 0.0;
}
