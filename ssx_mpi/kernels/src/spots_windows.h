/* Sums over the windows around listed pixels, and the tests made with them; included by spots.c once for each type of
 * pixel, with PIXEL the type and NAME(x) the name with its suffix. */

/* Sums of valid pixels over the windows centred on columns first..last of row `row`, into sums->m, x, y [0..last-first]. */
INLINED void NAME(window_sums)(const PIXEL *image, const uint8_t *mask,
                                                                    const uint8_t *state, uint8_t excluded,
                                                                    const struct geometry *g, int64_t ky, int64_t kx,
                                                                    int64_t row, int64_t first, int64_t last,
                                                                    const struct sums *sums)
{
    const int64_t left = first - kx > 0 ? first - kx : 0;
    const int64_t right = last + kx < g->nx - 1 ? last + kx : g->nx - 1;
    const int64_t top = row - ky > 0 ? row - ky : 0;
    const int64_t bottom = row + ky < g->ny - 1 ? row + ky : g->ny - 1;
    const int64_t width = right - left + 1;
    double *restrict cm = sums->column_m, *restrict cx = sums->column_x, *restrict cy = sums->column_y;

    for (int64_t i = 0; i < width; i++)
        cm[i] = cx[i] = cy[i] = 0.0;
    for (int64_t j = top; j <= bottom; j++) {
        const PIXEL *v = image + j * g->nx + left;
        const uint8_t *valid = mask + j * g->nx + left, *flags = state + j * g->nx + left;
        for (int64_t i = 0; i < width; i++) {
            const int counts = valid[i] & !(flags[i] & excluded) & (v[i] < TOO_BIG);
            const double value = counts ? (double)v[i] : 0.0;
            cm[i] += counts;
            cx[i] += value;
            cy[i] += value * value;
        }
    }
    double m = 0.0, x = 0.0, y = 0.0;
    int64_t enter = left, leave = left;
    for (int64_t i = first; i <= last; i++) {
        for (; enter <= right && enter <= i + kx; enter++) {
            m += cm[enter - left];
            x += cx[enter - left];
            y += cy[enter - left];
        }
        for (; leave < i - kx; leave++) {
            m -= cm[leave - left];
            x -= cx[leave - left];
            y -= cy[leave - left];
        }
        sums->m[i - first] = m;
        sums->x[i - first] = x;
        sums->y[i - first] = y;
    }
}

/* Keep of the `n` listed pixels (in raster order) those that pass `test`; returns how many. */
WIDE
static int64_t NAME(keep)(int test, const PIXEL *image, const uint8_t *mask, uint8_t *state,
                          const struct geometry *g, const struct criteria *c, const struct sums *sums,
                          int32_t *list, int64_t n)
{
    const int final = test == FINAL;
    const int64_t ky = g->ky + (final ? EXTENSION : 0), kx = g->kx + (final ? EXTENSION : 0);
    int64_t kept = 0;

    for (int64_t start = 0, stop; start < n; start = stop) {
        /* neighbours whose windows overlap share the sums over columns */
        const int64_t row = list[start] / g->nx, row_end = (row + 1) * g->nx;
        stop = start + 1;
        while (stop < n && list[stop] < row_end && list[stop] - list[stop - 1] <= 2 * kx)
            stop++;
        const int64_t first = list[start] - row * g->nx, last = list[stop - 1] - row * g->nx;
        NAME(window_sums)(image, mask, state, final ? SIGNAL : 0, g, ky, kx, row, first, last, sums);

        /* the list is written behind where it is read: kept <= l */
        const int64_t origin = list[start];
        for (int64_t l = start; l < stop; l++) {
            const int64_t k = list[l], s = k - origin;
            const double m = sums->m[s], x = sums->x[s], y = sums->y[s], value = (double)image[k];
            int pass;
            if (final) {
                const double mean = m >= 2 ? x / m : 0.0;
                pass = x >= 0 && value > c->threshold && value >= mean + c->n_sigma_strong * sqrt(c->gain * mean);
            } else {
                pass = m >= c->min_count && x >= 0
                       && m * y - x * x > c->gain * x * (m - 1 + c->n_sigma_background * sqrt(2 * (m - 1)));
                if (pass && test == STRONG)
                    pass = value > c->threshold && m * value - x > c->n_sigma_strong * sqrt(c->gain * x * m);
                else if (pass)
                    state[k] |= DISPERSED;
            }
            if (pass)
                list[kept++] = (int32_t)k;
        }
    }
    return kept;
}

/* Counts, sums and sums of squares of each column when a row enters (sign 1) or leaves (-1) the window. A pixel beyond
 * `cap` adds MANY to the count instead. */
INLINED void NAME(move_row)(const PIXEL *restrict v, const uint8_t *restrict mask,
                                                                 int64_t nx, PIXEL cap, PIXEL sign, PIXEL *restrict m,
                                                                 PIXEL *restrict x, PIXEL *restrict y)
{
    for (int64_t i = 0; i < nx; i++) {
        const PIXEL value = mask[i] ? v[i] : 0;
        /* so that not-a-number is beyond too */
        const int in_range = (value <= cap) & (value >= -cap);
        const PIXEL small = in_range ? value : 0;
        m[i] += sign * (PIXEL)(mask[i] + (in_range ? 0 : MANY));
        x[i] += sign * small;
        y[i] += sign * small * small;
    }
}

/* Where the window centred on each pixel of a row may be overdispersed. m, x, y start at column -kx and are 0 outside. */
INLINED void NAME(suspect_row)(int64_t nx, int64_t kx, float gain, float n_sigma,
                                                                    const PIXEL *restrict m, const PIXEL *restrict x,
                                                                    const PIXEL *restrict y,
                                                                    const uint8_t *restrict mask,
                                                                    uint8_t *restrict suspect)
{
    for (int64_t i = 0; i < nx; i++) {
        PIXEL sm = 0, sx = 0, sy = 0;
        for (int64_t d = 0; d <= 2 * kx; d++) {
            sm += m[i + d];
            sx += x[i + d];
            sy += y[i + d];
        }
        const float fm = (float)sm, fx = (float)sx, fy = (float)sy;
        const float excess = fm * fy - fx * fx;
        const float limit = gain * fx * (fm - 1.0f + n_sigma * sqrtf(2.0f * fabsf(fm - 1.0f)));
        /* far more than single precision can lose in these few operations */
        const float margin = 4e-6f * (fm * fy + fx * fx + fabsf(limit)) + DRIFT;
        suspect[i] = mask[i] & ((sm >= MANY) | (excess - limit + margin > 0.0f));
    }
}

/* List the valid pixels that may pass the dispersion test; returns how many. `rows` has 3 * (nx + 2 kx) elements and
 * `suspect` nx + 8. */
WIDE
static int64_t NAME(suspects)(const PIXEL *image, const uint8_t *mask, const struct geometry *g,
                              const struct criteria *c, PIXEL *rows, uint8_t *suspect, int32_t *list)
{
    const int64_t nx = g->nx, padded = nx + 2 * g->kx;
    const PIXEL cap = CAP((2 * g->ky + 1) * (2 * g->kx + 1));
    PIXEL *m = rows, *x = rows + padded, *y = rows + 2 * padded;
    const float gain = (float)c->gain, n_sigma = (float)c->n_sigma_background;
    int64_t n = 0;

    memset(rows, 0, (size_t)(3 * padded) * sizeof *rows);
    memset(suspect + nx, 0, 8);
    for (int64_t j = 0; j < g->ny + g->ky; j++) {
        if (j < g->ny)
            NAME(move_row)(image + j * nx, mask + j * nx, nx, cap, 1, m + g->kx, x + g->kx, y + g->kx);
        const int64_t old = j - 2 * g->ky - 1, row = j - g->ky;
        if (old >= 0)
            NAME(move_row)(image + old * nx, mask + old * nx, nx, cap, -1, m + g->kx, x + g->kx, y + g->kx);
        if (row < 0)
            continue;
        /* the usual width, unrolled */
        if (g->kx == 3)
            NAME(suspect_row)(nx, 3, gain, n_sigma, m, x, y, mask + row * nx, suspect);
        else
            NAME(suspect_row)(nx, g->kx, gain, n_sigma, m, x, y, mask + row * nx, suspect);
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

/* Strong pixels, as their places in raster order in `list`; returns how many.
 * Work space: rows (3 * (nx + 2 kx)), suspect (nx + 8), windows (6 * nx), state (ny * nx), list (ny * nx). */
int64_t NAME(ssx_dispersion)(const PIXEL *image, const uint8_t *mask, int64_t ny, int64_t nx, int64_t ky, int64_t kx,
                             double gain, double n_sigma_background, double n_sigma_strong, double threshold,
                             int64_t min_count, int extended, int erode_beside_masked, PIXEL *rows, uint8_t *suspect,
                             double *windows, uint8_t *state, int32_t *list)
{
    const struct geometry g = {ny, nx, ky, kx};
    const struct criteria c = {gain, n_sigma_background, n_sigma_strong, threshold, min_count};
    const struct sums sums = sums_of(windows, nx);
    const size_t n_pixels = (size_t)ny * (size_t)nx;
    /* the test of suspects reads MANY in the count of a window */
    const int countable = (2 * ky + 1) * (2 * kx + 1) < MANY / 16;
    int64_t n = countable ? NAME(suspects)(image, mask, &g, &c, rows, suspect, list) : all_valid(mask, n_pixels, list);

    memset(state, 0, n_pixels);
    if (!extended)
        return NAME(keep)(STRONG, image, mask, state, &g, &c, &sums, list, n);
    n = NAME(keep)(DISPERSION, image, mask, state, &g, &c, &sums, list, n);
    n = erode(mask, state, &g, erode_beside_masked, list, n);
    return NAME(keep)(FINAL, image, mask, state, &g, &c, &sums, list, n);
}
