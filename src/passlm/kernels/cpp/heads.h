// Parts shared by the sampler head and the draft head, which draft with two small layers.

#pragma once

#include <cmath>
#include <vector>

#include "products.h"

constexpr float EPSILON = 1e-6f;  // as in drafts/sampler_head.py

// A linear layer without bias.
struct Layer {
    View weights, scale;
    int64_t width;
    int threads;

    void times(const std::vector<float>& rows, int64_t number, std::vector<float>& made) const {
        made.resize(number * width);
        multiply_rows(rows.data(), number, weights, scale, made.data(), width, threads);
    }
};

// Write a row of a table, [n, width] bfloat16 or float32, scaled to root mean square 1.
inline void normed(const View& table, int64_t row, float* into) {
    const int64_t width = table.width();
    if (table.half()) {
        const char* from = table.data + 2 * row * width;
        for (int64_t k = 0; k < width; k++) into[k] = widened(from + 2 * k);
    } else {
        std::memcpy(into, table.data + 4 * row * width, 4 * width);
    }
    float sum = 0;
    for (int64_t k = 0; k < width; k++) sum += into[k] * into[k];
    const float scale = 1 / std::sqrt(sum / width + EPSILON);
    for (int64_t k = 0; k < width; k++) into[k] *= scale;
}

// Replace each number x by x / (1 + exp(-x)).
inline void silu(float* numbers, int64_t count) {
    for (int64_t first = 0; first < count; first += LANES) {
        const int64_t size = 4 * std::min<int64_t>(LANES, count - first);
        Floats x{};
        std::memcpy(&x, numbers + first, size);
        const Integers above = x > 0;
        const Floats power = exponential(above ? -x : x);
        const Floats given = x * (above ? spread(1) : power) / (power + 1.0f);
        std::memcpy(numbers + first, &given, size);
    }
}

// Sequences, the number of draft tokens of each, and their last tokens, the latest first.
struct Texts {
    const int64_t* lengths;
    std::vector<int64_t> last;
    int64_t number, told;  // of sequences, and of last tokens of each

    Texts(const View& lengths_of, const View& tokens)
        : lengths(reinterpret_cast<const int64_t*>(lengths_of.data)),
          last(reinterpret_cast<const int64_t*>(tokens.data),
               reinterpret_cast<const int64_t*>(tokens.data) + tokens.numbers),
          number(tokens.sizes[0]),
          told(tokens.width()) {}

    // Return the sequences that get a draft token at this depth; write the normalized embeddings of
    // their last tokens to `into`.
    std::vector<int64_t> reaching(int64_t depth, const View& inputs, std::vector<float>& into) {
        std::vector<int64_t> going;
        for (int64_t n = 0; n < number; n++) {
            if (lengths[n] > depth) going.push_back(n);
        }
        into.resize(going.size() * told * inputs.width());
        float* place = into.data();
        for (int64_t n : going) {
            for (int64_t t = 0; t < told; t++, place += inputs.width()) {
                const int64_t token = last[n * told + t];
                STD_TORCH_CHECK(token >= 0 && token < inputs.sizes[0], "no such token");
                normed(inputs, token, place);
            }
        }
        return going;
    }

    // Make `token` the latest token of a sequence.
    void append(int64_t text, int64_t token) {
        int64_t* own = &last[text * told];
        std::copy_backward(own, own + told - 1, own + told);
        own[0] = token;
    }
};

// Noise of the draws to come: noise of each position, [texts, depths, width] float32, and the
// factor of its logarithm in the sum with each sequence's logits, [texts]. Both are empty where no
// noise is known.
struct Race {
    View noise, scales;

    // Raise an error if there is less noise than draft tokens.
    void check(const View& lengths, int64_t width) const {
        if (!noise.numbers) return;
        const int64_t texts = lengths.numbers;
        const auto* asked = reinterpret_cast<const int64_t*>(lengths.data);
        STD_TORCH_CHECK(noise.dimensions == 3 && noise.full() && scales.full() &&
                            noise.sizes[0] == texts && scales.numbers == texts &&
                            noise.width() == width && noise.strides[2] == 1 &&
                            noise.strides[1] == width &&
                            noise.strides[0] == noise.sizes[1] * width &&
                            (!texts || noise.sizes[1] >= *std::max_element(asked, asked + texts)),
                        "there is not as much noise as there are texts and tokens");
    }

    // The noise of a position, or null.
    const float* at(int64_t text, int64_t depth) const {
        if (!noise.numbers) return nullptr;
        const int64_t place = text * noise.sizes[1] + depth;
        return reinterpret_cast<const float*>(noise.data) + place * noise.width();
    }

    float scale(int64_t text) const { return reinterpret_cast<const float*>(scales.data)[text]; }
};

// Whether a tensor is a contiguous table of rows, [n, width] bfloat16 or float32.
inline bool is_table(const View& tensor, int64_t width) {
    if (tensor.dimensions != 2 || tensor.width() != width) return false;
    const bool one = tensor.sizes[0] == 1;  // its stride has no meaning then
    const bool close = tensor.strides[1] == 1 && (one || tensor.strides[0] == width);
    return close && (tensor.half() || tensor.full());
}
