// Random numbers of a position, for CPUs; see sampling.py.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a block of
// four numbers is a function of its counter and a key alone, so blocks are made side by side.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int WORDS = 4;  // of a block
constexpr int TOGETHER = 64;
constexpr int ROUNDS = 10;
constexpr uint32_t FACTORS[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t STEPS[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr double WIDTH = 1.0 / 4294967296.0;       // of one of 2**32 shares
constexpr float MOST = 1.0f - 1.0f / 16777216.0f;  // the largest float32 below 1

}  // namespace

// The first numbers between 0 and 1 of a key and a counter, whose lowest 32 bits count blocks.
extern "C" void passlm_uniform(const uint32_t* key, const uint32_t* counter, int64_t count,
                               float* made) {
    for (int64_t first = 0; first * WORDS < count; first += TOGETHER) {
        uint32_t words[WORDS][TOGETHER];
        for (int i = 0; i < TOGETHER; i++) {
            words[0][i] = static_cast<uint32_t>(first + i);
            for (int word = 1; word < WORDS; word++) {
                words[word][i] = counter[word - 1];
            }
        }
        uint32_t round_key[2] = {key[0], key[1]};
        for (int round = 0; round < ROUNDS; round++) {
            for (int i = 0; i < TOGETHER; i++) {
                const uint64_t a = static_cast<uint64_t>(words[0][i]) * FACTORS[0];
                const uint64_t b = static_cast<uint64_t>(words[2][i]) * FACTORS[1];
                words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ round_key[0];
                words[1][i] = static_cast<uint32_t>(b);
                words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ round_key[1];
                words[3][i] = static_cast<uint32_t>(a);
            }
            round_key[0] += STEPS[0];
            round_key[1] += STEPS[1];
        }
        float numbers[TOGETHER * WORDS];
        for (int i = 0; i < TOGETHER; i++) {
            for (int word = 0; word < WORDS; word++) {
                const double middle = (words[word][i] + 0.5) * WIDTH;
                numbers[i * WORDS + word] = std::min(static_cast<float>(middle), MOST);
            }
        }
        const int64_t left = std::min<int64_t>(TOGETHER * WORDS, count - first * WORDS);
        std::copy_n(numbers, left, made + first * WORDS);
    }
}
