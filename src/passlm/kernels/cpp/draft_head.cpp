// Greedy draft tokens of a draft head, for CPUs; see drafts/draft_head.py.
//
// A draft token takes four small matrix products and some elementwise operations. In torch these
// are about thirty operators, whose calls take longer than the products; here one call computes all
// draft tokens of all sequences.

#include <tuple>
#include <vector>

#include "heads.h"

namespace {

using torch::stable::Tensor;

// The index of the largest logit (the first of ties), and its softmax probability after all logits
// are divided by `divisor`.
std::pair<int64_t, float> likeliest(const float* logits, int64_t count, float divisor) {
    const int64_t best = std::max_element(logits, logits + count) - logits;
    const float scale = 1 / divisor;
    Floats sums{};
    for (int64_t first = 0; first < count; first += LANES) {
        Floats below = spread(-1e30f);
        std::memcpy(&below, logits + first, 4 * std::min<int64_t>(LANES, count - first));
        sums += exponential((below - logits[best]) * scale);
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return {best, 1 / sum};
}

// Draft tokens of N sequences.
//
// hidden: [N, d_model]. last: ids of each sequence's last tokens, the latest first, [N, tokens].
// lengths: number of draft tokens of each sequence, [N]. listed: token ids that `outputs` scores.
// inputs: input embeddings, [V, d_model]. divisors: what logits with noise are divided by before
// the softmax that gives the confidence, [N].
//
// Returns token ids and the head's confidence in them, both [N, depths]; -1 and 0 beyond the
// length.
std::tuple<Tensor, Tensor> guesses(const View& hidden, const View& last, const View& lengths,
                                   const Layer& hidden_in, const Layer& token_in,
                                   const View& depth_in, const Layer& out, const Layer& outputs,
                                   const View& listed, const View& inputs, const Race& race,
                                   const View& divisors) {
    const int64_t texts = hidden.sizes[0], d_model = hidden.width();
    const int64_t width = depth_in.width(), depths = depth_in.sizes[0], count = listed.numbers;
    const auto* ids = reinterpret_cast<const int64_t*>(listed.data);
    const auto* depth_numbers = reinterpret_cast<const float*>(depth_in.data);
    const int64_t sizes[2] = {texts, depths};
    const Tensor made(empty(sizes, 2, aoti_torch_dtype_int64()));
    const Tensor chances(empty(sizes, 2, aoti_torch_dtype_float32()));
    auto* tokens = reinterpret_cast<int64_t*>(View(made.get()).data);
    auto* sureness = reinterpret_cast<float*>(View(chances.get()).data);
    std::fill_n(tokens, texts * depths, -1);
    std::fill_n(sureness, texts * depths, 0.0f);
    std::vector<float> rows(texts * d_model), from_hidden, inner, state, logits;
    for (int64_t n = 0; n < texts; n++) normed(hidden, n, rows.data() + n * d_model);
    hidden_in.times(rows, texts, from_hidden);
    Texts under_way(lengths, last);
    for (int64_t depth = 0; depth < depths; depth++) {
        const std::vector<int64_t> going = under_way.reaching(depth, inputs, rows);
        if (going.empty()) break;
        const int64_t number = going.size();
        token_in.times(rows, number, inner);
        for (int64_t i = 0; i < number; i++) {
            const float* own = from_hidden.data() + going[i] * width;
            const float* added = depth_numbers + depth * width;
            for (int64_t k = 0; k < width; k++) inner[i * width + k] += own[k] + added[k];
        }
        silu(inner.data(), number * width);
        out.times(inner, number, state);
        outputs.times(state, number, logits);
        for (int64_t i = 0; i < number; i++) {
            const int64_t n = going[i];
            float* own = logits.data() + i * count;
            const float* noise = race.at(n, depth);
            for (int64_t k = 0; noise && k < count; k++) own[k] -= race.scale(n) * std::log(noise[k]);
            const float divisor = noise ? reinterpret_cast<const float*>(divisors.data)[n] : 1;
            const auto [place, sure] = likeliest(own, count, divisor);
            tokens[n * depths + depth] = ids[place];
            sureness[n * depths + depth] = sure;
            under_way.append(n, ids[place]);
        }
    }
    return {made, chances};
}

std::tuple<Tensor, Tensor> boxed(Tensor hidden, Tensor last, Tensor lengths, Tensor hidden_in,
                                 Tensor hidden_scale, Tensor token_in, Tensor token_scale,
                                 Tensor depth_in, Tensor out, Tensor out_scale, Tensor outputs,
                                 Tensor outputs_scale, Tensor listed, Tensor inputs,
                                 Tensor noise, Tensor scales, Tensor flattened, int64_t threads) {
    const View rows(hidden.get()), before(last.get()), asked(lengths.get());
    const View depths(depth_in.get()), ids(listed.get()), table(inputs.get());
    const int64_t d_model = table.width(), width = depths.width();
    const auto layer = [&](const Tensor& weights, const Tensor& scale, int64_t wide) {
        return Layer{View(weights.get()), View(scale.get()), wide, int(threads)};
    };
    const Layer from_hidden = layer(hidden_in, hidden_scale, width);
    const Layer told = layer(token_in, token_scale, width), back = layer(out, out_scale, d_model);
    const Layer to_listed = layer(outputs, outputs_scale, ids.numbers);
    STD_TORCH_CHECK(is_table(rows, d_model) && is_table(table, d_model),
                    "hidden states and embeddings must be rows of bfloat16 or float32");
    STD_TORCH_CHECK(before.whole() && asked.whole() && ids.whole() && depths.full(),
                    "a tensor has the wrong type");
    STD_TORCH_CHECK(before.sizes[0] == rows.sizes[0] && asked.numbers == rows.sizes[0],
                    "not as many texts as hidden states");
    STD_TORCH_CHECK(from_hidden.weights.sizes[1] == d_model &&
                        told.weights.sizes[1] == before.width() * d_model &&
                        back.weights.sizes[1] == width && to_listed.weights.sizes[1] == d_model,
                    "the shapes of the head's layers do not match");
    const Race race{View(noise.get()), View(scales.get())};
    const View divisors(flattened.get());
    race.check(asked, ids.numbers);
    STD_TORCH_CHECK(divisors.full() && divisors.numbers == race.scales.numbers,
                    "there must be one divisor for each text");
    return guesses(rows, before, asked, from_hidden, told, depths, back, to_listed, ids, table,
                   race, divisors);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(passlm, CPU, library) {
    library.impl("guesses", TORCH_BOX(&boxed));
}
