// Draft tokens of look-ahead groups by a sampler head, for CPUs; see drafts/sampler_head.py.

#include "heads.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t BLOCK = 64;      // logits that share one maximum
constexpr float NOTHING = -1e30f;  // in place of NaN

// The top tokens of a row, best first.
struct Shortlist {
    std::vector<float> logits;
    std::vector<int64_t> tokens;
};

Shortlist shortlist(const View& logits, int64_t row, int64_t count) {
    const int64_t vocabulary = logits.width(), blocks = (vocabulary + BLOCK - 1) / BLOCK;
    std::vector<float> numbers(blocks * BLOCK, NOTHING), largest(blocks);
    if (logits.half()) {
        const char* from = logits.data + 2 * row * vocabulary;
        for (int64_t v = 0; v < vocabulary; v++) numbers[v] = widened(from + 2 * v);
    } else {
        std::memcpy(numbers.data(), logits.data + 4 * row * vocabulary, 4 * vocabulary);
    }
    for (float& number : numbers) number = number > NOTHING ? number : NOTHING;
    for (int64_t b = 0; b < blocks; b++) {
        const float* own = &numbers[b * BLOCK];
        float lanes[LANES];
        std::copy_n(own, LANES, lanes);
        for (int64_t k = LANES; k < BLOCK; k += LANES) {
            for (int l = 0; l < LANES; l++) lanes[l] = std::max(lanes[l], own[k + l]);
        }
        largest[b] = *std::max_element(lanes, lanes + LANES);
    }
    // The top `count` logits are at least as large as the `count`-th largest block maximum.
    float least = NOTHING;
    if (blocks > count) {
        std::vector<float> ordered(largest);
        std::nth_element(ordered.begin(), ordered.begin() + count - 1, ordered.end(),
                         std::greater<float>());
        least = ordered[count - 1];
    }
    std::vector<int64_t> found;
    for (int64_t b = 0; b < blocks; b++) {
        if (largest[b] < least) continue;
        const int64_t end = std::min((b + 1) * BLOCK, vocabulary);
        for (int64_t v = b * BLOCK; v < end; v++) {
            if (numbers[v] >= least) found.push_back(v);
        }
    }
    const int64_t kept = std::min<int64_t>(count, found.size());
    std::partial_sort(found.begin(), found.begin() + kept, found.end(), [&](int64_t a, int64_t b) {
        return numbers[a] != numbers[b] ? numbers[a] > numbers[b] : a < b;
    });
    found.resize(kept);
    Shortlist made{{}, found};
    for (int64_t token : found) made.logits.push_back(numbers[token]);
    return made;
}

typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

// LANES numbers of a table, bfloat16 or float32, from index `at` on.
template <bool half>
Floats numbers_at(const char* data, int64_t at) {
    if constexpr (half) {
        Halves halves;
        std::memcpy(&halves, data + 2 * at, sizeof(halves));
        return (Floats)(__builtin_convertvector(halves, Words) << 16);
    } else {
        Floats numbers;
        std::memcpy(&numbers, data + 4 * at, sizeof(numbers));
        return numbers;
    }
}

// The dot product of a row of a table and `numbers`.
template <bool half>
float dot(const View& table, int64_t row, const float* numbers) {
    const int64_t width = table.width(), whole = width / LANES * LANES, start = row * width;
    Floats sums{};
    for (int64_t k = 0; k < whole; k += LANES) {
        Floats other;
        std::memcpy(&other, numbers + k, sizeof(other));
        sums = fused(numbers_at<half>(table.data, start + k), other, sums);
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    for (int64_t k = whole; k < width; k++) {
        const char* from = table.data + (half ? 2 : 4) * (start + k);
        float own;
        if (half) {
            own = widened(from);
        } else {
            std::memcpy(&own, from, 4);
        }
        sum += own * numbers[k];
    }
    return sum;
}

// Draft tokens of G groups with R rows in total.
//
// logits: of all rows, group after group, [R, V]. hidden: [R, d_model]. lengths: of the groups,
// [G]. last: ids of the last tokens before each group, the latest first, [G, tokens]. listed:
// number of top tokens of a row that the head chooses from. inputs, outputs: the target's embedding
// tables, [V, d_model].
//
// Returns token ids, [G, length of the longest group]; -1 beyond a group's length.
Tensor guesses(const View& logits, const View& hidden, const View& lengths, const View& last,
               const Layer& hidden_in, const Layer& token_in, const Layer& out,
               const View& inputs, const View& outputs, const Race& race, int64_t listed,
               int threads) {
    const int64_t rows = hidden.sizes[0], d_model = hidden.width();
    const int64_t groups = lengths.numbers, width = hidden_in.width;
    const auto* lengths_of = reinterpret_cast<const int64_t*>(lengths.data);
    std::vector<int64_t> starts{0};
    for (int64_t g = 0; g < groups; g++) starts.push_back(starts[g] + lengths_of[g]);
    STD_TORCH_CHECK(starts.back() == rows, "group lengths do not add up to the number of rows");
    const int64_t depths = groups ? *std::max_element(lengths_of, lengths_of + groups) : 0;
    const int64_t sizes[2] = {groups, depths};
    const Tensor made(empty(sizes, 2, aoti_torch_dtype_int64()));
    auto* tokens = reinterpret_cast<int64_t*>(View(made.get()).data);
    std::fill_n(tokens, groups * depths, -1);
    std::vector<Shortlist> best(rows);
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) best[r] = shortlist(logits, r, listed);
    std::vector<float> given(rows * d_model), from_hidden, inner, correction;
    for (int64_t r = 0; r < rows; r++) normed(hidden, r, &given[r * d_model]);
    hidden_in.times(given, rows, from_hidden);
    Texts texts(lengths, last);
    for (int64_t depth = 0; depth < depths; depth++) {
        const std::vector<int64_t> going = texts.reaching(depth, inputs, given);
        const int64_t number = going.size();
        token_in.times(given, number, inner);
        for (int64_t i = 0; i < number; i++) {
            const float* own = &from_hidden[(starts[going[i]] + depth) * width];
            for (int64_t k = 0; k < width; k++) inner[i * width + k] += own[k];
        }
        silu(inner.data(), number * width);
        out.times(inner, number, correction);
        for (int64_t i = 0; i < number; i++) {
            const Shortlist& own = best[starts[going[i]] + depth];
            const float* noise = race.at(going[i], depth);
            const float scale = noise ? race.scale(going[i]) : 0;
            int64_t token = -1;
            float most = 0;
            for (size_t k = 0; k < own.tokens.size(); k++) {
                const float* moved = &correction[i * d_model];
                const float gained = outputs.half() ? dot<true>(outputs, own.tokens[k], moved)
                                                    : dot<false>(outputs, own.tokens[k], moved);
                const float lost = noise ? scale * std::log(noise[own.tokens[k]]) : 0;
                const float logit = own.logits[k] + gained - lost;
                if (token < 0 || logit > most) {
                    token = own.tokens[k];
                    most = logit;
                }
            }
            tokens[going[i] * depths + depth] = token;
            texts.append(going[i], token);
        }
    }
    return made;
}

Tensor boxed(Tensor logits, Tensor hidden, Tensor lengths, Tensor last, Tensor hidden_in,
             Tensor token_in, Tensor out, Tensor inputs, Tensor outputs, Tensor none,
             Tensor noise, Tensor scales, int64_t listed, int64_t threads) {
    const View rows(hidden.get()), whole(logits.get()), asked(lengths.get()), before(last.get());
    const View table(inputs.get()), others(outputs.get());
    const int64_t d_model = table.width();
    const View first(hidden_in.get()), second(token_in.get()), third(out.get()), scale(none.get());
    const int64_t width = third.sizes[1];
    STD_TORCH_CHECK(is_table(rows, d_model) && is_table(table, d_model) &&
                        is_table(others, d_model) && is_table(whole, others.sizes[0]),
                    "rows and tables must be bfloat16 or float32");
    STD_TORCH_CHECK(before.whole() && asked.whole(), "token ids and lengths must be int64");
    STD_TORCH_CHECK(before.sizes[0] == asked.numbers && whole.sizes[0] == rows.sizes[0],
                    "not as many texts as groups, or logits as hidden states");
    STD_TORCH_CHECK(first.sizes[1] == d_model && second.sizes[1] == before.width() * d_model &&
                        listed >= 1,
                    "the shapes of the head's layers do not match");
    const Race race{View(noise.get()), View(scales.get())};
    race.check(asked, whole.width());
    return guesses(whole, rows, asked, before, {first, scale, width, int(threads)},
                   {second, scale, width, int(threads)}, {third, scale, d_model, int(threads)},
                   table, others, race, listed, int(threads));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(passlm, CPU, library) {
    library.impl("weighed_guesses", TORCH_BOX(&boxed));
}
