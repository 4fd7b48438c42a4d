/* CBF byte-offset decompression; described in ssx_mpi/kernels/cbf.py. */
#include <stddef.h>
#include <stdint.h>

/* Pixels decoded: `n_pixels`, or fewer when the bytes end before. */
int64_t ssx_cbf_byte_offset(const uint8_t *bytes, int64_t n_bytes, int64_t n_pixels, int32_t *pixels)
{
    const uint8_t *p = bytes, *const end = bytes + n_bytes;
    int32_t *out = pixels, *const stop = pixels + n_pixels;
    /* unsigned: a damaged file may make the sum wrap */
    uint64_t value = 0;

    while (out < stop) {
        /* nearly every difference fits one byte: eight at a time, as long as none of them is the escape 0x80 */
        while (end - p >= 8 && stop - out >= 8) {
            uint64_t word;
            __builtin_memcpy(&word, p, 8);
            const uint64_t other = word ^ 0x8080808080808080u;
            if ((other - 0x0101010101010101u) & ~other & 0x8080808080808080u)
                break;
            for (int i = 0; i < 8; i++) {
                value += (uint64_t)(int64_t)(int8_t)p[i];
                out[i] = (int32_t)value;
            }
            p += 8;
            out += 8;
        }
        if (out == stop)
            break;
        int64_t left = end - p;
        if (left < 1)
            break;
        int64_t delta = (int8_t)p[0];
        int used = 1;
        if (delta == INT8_MIN) {
            if (left < 3)
                break;
            delta = (int16_t)(p[1] | p[2] << 8);
            used = 3;
            if (delta == INT16_MIN) {
                if (left < 7)
                    break;
                delta = (int32_t)((uint32_t)p[3] | (uint32_t)p[4] << 8 | (uint32_t)p[5] << 16 | (uint32_t)p[6] << 24);
                used = 7;
                if (delta == INT32_MIN) {
                    if (left < 15)
                        break;
                    uint64_t wide = 0;
                    for (int i = 14; i >= 7; i--)
                        wide = wide << 8 | p[i];
                    delta = (int64_t)wide;
                    used = 15;
                }
            }
        }
        p += used;
        value += (uint64_t)delta;
        *out++ = (int32_t)value;
    }
    return out - pixels;
}
