/* Sums over the windows around listed pixels, and the tests made with them; included by spots.c once for each type of
 * pixel, with PIXEL the type and NAME(x) the name with its suffix. */

/* Sums of valid pixels over the windows centred on columns first..last of row `row`, into sums->m, x, y [0..last-first]. */
static void NAME(window_sums)(const PIXEL *image, const uint8_t *mask, const uint8_t *state, uint8_t excluded,
                              const struct geometry *g, int64_t ky, int64_t kx, int64_t row, int64_t first, int64_t last,
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
        for (int64_t i = 0; i < width; i++)
            if (valid[i] && !(flags[i] & excluded) && v[i] < TOO_BIG) {
                const double value = (double)v[i];
                cm[i] += 1.0;
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

static int64_t NAME(threshold)(const PIXEL *image, const uint8_t *mask, const struct geometry *g,
                               const struct criteria *c, uint8_t *state, const struct sums *sums, int32_t *list,
                               int64_t n)
{
    if (!c->extended)
        return NAME(keep)(STRONG, image, mask, state, g, c, sums, list, n);
    memset(state, 0, (size_t)g->ny * (size_t)g->nx);
    n = NAME(keep)(DISPERSION, image, mask, state, g, c, sums, list, n);
    n = erode(mask, state, g, c->erode_beside_masked, list, n);
    return NAME(keep)(FINAL, image, mask, state, g, c, sums, list, n);
}
