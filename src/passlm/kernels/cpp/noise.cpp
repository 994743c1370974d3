// Random numbers of a position, for CPUs; see kernels/philox.py.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a block of
// four numbers is a function of a counter and a key alone, so LANES blocks are computed in
// parallel.

#include "vectors.h"

namespace {

typedef uint64_t Pairs __attribute__((vector_size(LANES * 4)));

constexpr int WORDS = 4;  // in a block
constexpr int ROUNDS = 10;
constexpr uint32_t FACTORS[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t STEPS[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr float WIDTH = 1.0f / 4294967296.0f;      // of one of 2**32 intervals
constexpr float MOST = 1.0f - 1.0f / 16777216.0f;  // the largest float32 below 1

// The 64-bit products of a factor and every second word, starting with the first.
ALWAYS_INLINE Pairs products(Pairs words, uint32_t factor) {
#if LANES == 16
    return (Pairs)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(factor));
#else
    return (Pairs)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(factor));
#endif
}

// Multiply each word by a factor; return the upper and the lower 32 bits.
ALWAYS_INLINE void multiply(Words words, uint32_t factor, Words& upper, Words& lower) {
    constexpr uint64_t low = 0xffffffffu;
    const Pairs even = products((Pairs)words, factor);
    const Pairs odd = products((Pairs)words >> 32, factor);
    upper = (Words)((even >> 32) | (odd & ~low));
    lower = (Words)((even & low) | (odd << 32));
}

// Map words to the midpoints of 2**32 equal intervals between 0 and 1, rounded once.
ALWAYS_INLINE Floats middles(Words words) {
    const Floats upper = __builtin_convertvector((Integers)(words >> 16), Floats);
    const Floats lower = __builtin_convertvector((Integers)(words & 0xffffu), Floats) + 0.5f;
    const Floats made = fused(upper, spread(65536.0f), lower) * WIDTH;
    return made < MOST ? made : spread(MOST);
}

}  // namespace

// Write `count` numbers between 0 and 1. key: [2]. counter: its words 1 to 3, [3]; word 0 counts
// blocks.
extern "C" void passlm_uniform(const uint32_t* key, const uint32_t* counter, int64_t count,
                               float* made) {
    Words lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    for (int64_t first = 0; first * WORDS < count; first += LANES) {
        Words a = lane + uint32_t(first), b = Words{} + counter[0];
        Words c = Words{} + counter[1], d = Words{} + counter[2];
        uint32_t keys[2] = {key[0], key[1]};
        for (int round = 0; round < ROUNDS; round++) {
            Words upper[2], lower[2];
            multiply(a, FACTORS[0], upper[0], lower[0]);
            multiply(c, FACTORS[1], upper[1], lower[1]);
            a = upper[1] ^ b ^ keys[0];
            b = lower[1];
            c = upper[0] ^ d ^ keys[1];
            d = lower[0];
            for (int k = 0; k < 2; k++) keys[k] += STEPS[k];
        }
        const Floats block[WORDS] = {middles(a), middles(b), middles(c), middles(d)};
        float numbers[LANES * WORDS];
        for (int l = 0; l < LANES; l++) {
            for (int word = 0; word < WORDS; word++) numbers[l * WORDS + word] = block[word][l];
        }
        const int64_t left = std::min<int64_t>(LANES * WORDS, count - first * WORDS);
        std::copy_n(numbers, left, made + first * WORDS);
    }
}
