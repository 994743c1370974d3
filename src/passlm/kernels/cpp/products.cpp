// Products of a few rows with a weight matrix, for CPUs; see kernels/linear.py.
//
// Decoding multiplies one to about twenty rows by every weight of the model. Reading the weights
// determines the time, as long as the arithmetic of the rows keeps up with it: here weights are
// unpacked to float32 in registers, and each is multiplied by all rows before the next is read. An
// output is summed over the inputs in order, by one chain of fused multiply-adds, for any number of
// rows: a row's result does not depend on the other rows, bit for bit.
//
// Weights lie in blocks. A block has LANES 32-bit words for each input. A word holds 1 float32, 2
// bfloat16 or 4 int8 weights, each of a different output; the outputs of one word are LANES apart.
//
// Some rows may have an update, B A x (LoRA). It continues the sum over the inputs.

#include <vector>

#include <omp.h>

#include "products.h"

namespace {

constexpr int REGISTERS = LANES == 16 ? 32 : 16;
constexpr int WIDE = 4;    // output vectors of a tile with few rows
constexpr int NARROW = 2;  // output vectors of a tile with more rows
// Sums, weights and one input number of a row must fit in the registers.
constexpr int FEW_ROWS = (REGISTERS - WIDE - 1) / WIDE;
constexpr int MOST_ROWS = (REGISTERS - NARROW - 1) / NARROW;  // rows of one tile
// Prefetch distances in bytes, into the L1 and into the L2 cache.
constexpr int SOON = 1024;
constexpr int LATER = 8192;
constexpr int64_t ALONE = 32768;  // up to this many bytes of weights, one thread is fastest

// Types of weights: how many a word holds, and how to unpack the one at index `at`.

struct Float32 {
    static constexpr int weights = 1;
    template <int at>
    static Floats unpacked(Words words) {
        return (Floats)words;
    }
};

struct BFloat16 {
    static constexpr int weights = 2;
    template <int at>
    static Floats unpacked(Words words) {
        return at == 0 ? (Floats)(words << 16) : (Floats)(words & 0xffff0000u);
    }
};

struct Int8 {
    static constexpr int weights = 4;
    template <int at>
    static Floats unpacked(Words words) {
        const Words top = at == 3 ? words : words << (24 - 8 * at);
        return __builtin_convertvector((Integers)top >> 24, Floats);
    }
};

template <class Kind, int first, int at, int count>
ALWAYS_INLINE void unpack(const Words* words, Floats* into) {
    if constexpr (at < count) {
        constexpr int place = first + at;
        into[at] = Kind::template unpacked<place % Kind::weights>(words[place / Kind::weights]);
        unpack<Kind, first, at + 1, count>(words, into);
    }
}

// The LoRA update that is added to the sums of some rows.

struct Update {
    const float* low;      // A x of all layers, 0 for rows without update: tiles of [numbers, rows]
    int64_t numbers;       // length of a row's A x; 0 if no row has an update
    const uint32_t* up;    // B in blocks of bfloat16, [rank, LANES] each
    const int64_t* parts;  // for each vector of outputs, where the A x of its layer begins
    int64_t rank;

    // Column `k` of B for the output vector with index `lanes`.
    Floats weights(int64_t lanes, int64_t k) const {
        Words words;
        std::memcpy(&words, up + (lanes / 2 * rank + k) * LANES, sizeof(Words));
        return lanes % 2 ? BFloat16::unpacked<1>(words) : BFloat16::unpacked<0>(words);
    }
};

// Where outputs go, and how sums become outputs: they are scaled and updated (in `tile`), then the
// bias is added and the result rounded to the type of the rows (in `store`).

struct Output {
    const float* scale;  // padded to whole blocks; null for 1
    const char* bias;    // in the type of `out`; null for 0
    char* out;
    int64_t width;
    bool half;           // whether `out` is bfloat16; else float32
    Update update;

    void store(float* values, int64_t row, int64_t column, int64_t count) const {
        if (bias && half) {
            for (int64_t i = 0; i < count; i++) values[i] += widened(bias + 2 * (column + i));
        } else if (bias) {
            const float* added = reinterpret_cast<const float*>(bias) + column;
            for (int64_t i = 0; i < count; i++) values[i] += added[i];
        }
        if (!half) {
            std::memcpy(out + 4 * (row * width + column), values, 4 * count);
            return;
        }
        uint32_t words[WIDE * LANES];
        std::memcpy(words, values, 4 * count);
        uint16_t halves[WIDE * LANES];
        for (int64_t i = 0; i < count; i++) halves[i] = rounded(words[i]) >> 16;
        std::memcpy(out + 2 * (row * width + column), halves, 2 * count);
    }
};

// Weights that are prefetched into the L2 cache while others are multiplied.

struct Ahead {
    const char* from;
    int64_t bytes;  // to prefetch for each vector of words that is multiplied

    void ask(int64_t word) const { __builtin_prefetch(from + word * bytes, 0, 2); }
};

// Multiply `rows` rows by the weights of `count` output vectors, from vector `first` of a block on.
//
// given: the rows, [inputs, rows], float32. weights: blocks, [inputs, LANES] words each. row,
// column: the first row and output in `output`.
template <class Kind, int rows, int count, int first>
__attribute__((noinline)) void tile(const float* __restrict given,
                                    const uint32_t* __restrict weights, int64_t inputs,
                                    const Ahead& ahead, const Output& output, int64_t row,
                                    int64_t column) {
    constexpr int blocks = (first + count + Kind::weights - 1) / Kind::weights;
    Floats sums[rows][count] = {};
    for (int64_t k = 0; k < inputs; k++) {
        Words words[blocks];
#pragma GCC unroll 8
        for (int b = 0; b < blocks; b++) {
            const uint32_t* from = weights + (b * inputs + k) * LANES;
            std::memcpy(&words[b], from, sizeof(Words));
            __builtin_prefetch(reinterpret_cast<const char*>(from) + SOON, 0, 3);
            ahead.ask(b * inputs + k);
        }
        Floats unpacked[count];
        unpack<Kind, first, 0, count>(words, unpacked);
#pragma GCC unroll 32
        for (int r = 0; r < rows; r++) {
            const Floats number = spread(given[k * rows + r]);
#pragma GCC unroll 8
            for (int v = 0; v < count; v++) sums[r][v] = fused(unpacked[v], number, sums[r][v]);
        }
    }
    for (int v = 0; v < count && output.scale; v++) {
        Floats scale;
        std::memcpy(&scale, output.scale + column + v * LANES, sizeof(Floats));
        for (int r = 0; r < rows; r++) sums[r][v] *= scale;
    }
    const Update& update = output.update;
    for (int v = 0; v < count && update.numbers && column + v * LANES < output.width; v++) {
        const int64_t lanes = column / LANES + v;
        const float* low = update.low + row * update.numbers + update.parts[lanes] * rows;
        for (int64_t k = 0; k < update.rank; k++) {
            const Floats up = update.weights(lanes, k);
            for (int r = 0; r < rows; r++) {
                sums[r][v] = fused(up, spread(low[k * rows + r]), sums[r][v]);
            }
        }
    }
    const int64_t left = std::min<int64_t>(count * LANES, output.width - column);
    for (int r = 0; r < rows && left > 0; r++) {
        float stored[count * LANES];
        std::memcpy(stored, sums[r], sizeof(stored));
        output.store(stored, row + r, column, left);
    }
}

// Multiply rows by the blocks from `begin` to `end`, prefetching from `ahead` on.
template <class Kind, int rows>
void tiles(const float* given, const uint32_t* weights, int64_t inputs, int64_t begin, int64_t end,
           const Ahead& ahead, const Output& output, int64_t row) {
    constexpr int count = rows <= FEW_ROWS ? WIDE : NARROW;
    constexpr int wide = Kind::weights * LANES;  // outputs in a block
    const int64_t size = inputs * LANES;
    const auto behind = [&](int64_t b) {
        return Ahead{ahead.from + (b - begin) * inputs * ahead.bytes, ahead.bytes};
    };
    int64_t b = begin;
    if constexpr (count >= Kind::weights) {
        constexpr int together = count / Kind::weights;
        for (; b + together <= end; b += together) {
            tile<Kind, rows, count, 0>(given, weights + b * size, inputs, behind(b), output, row,
                                       b * wide);
        }
        for (; b < end; b++) {
            tile<Kind, rows, Kind::weights, 0>(given, weights + b * size, inputs, behind(b),
                                               output, row, b * wide);
        }
    } else {
        for (; b < end; b++) {
            const uint32_t* block = weights + b * size;
            tile<Kind, rows, NARROW, 0>(given, block, inputs, behind(b), output, row, b * wide);
            tile<Kind, rows, NARROW, NARROW>(given, block, inputs, behind(b), output, row,
                                             b * wide + NARROW * LANES);
        }
    }
}

// Call `tiles` with the number of rows as a template argument.
template <class Kind, int rows = MOST_ROWS>
void of_rows(int64_t number, const float* given, const uint32_t* weights, int64_t inputs,
             int64_t begin, int64_t end, const Ahead& ahead, const Output& output, int64_t row) {
    if (number == rows) {
        tiles<Kind, rows>(given, weights, inputs, begin, end, ahead, output, row);
    } else if constexpr (rows > 1) {
        of_rows<Kind, rows - 1>(number, given, weights, inputs, begin, end, ahead, output, row);
    }
}

// Multiply all rows by all blocks. starts: the first row of each tile, then the number of rows.
template <class Kind>
void multiply(const std::vector<int64_t>& starts, const float* given, const uint32_t* weights,
              int64_t inputs, int64_t blocks, const Output& output, int threads) {
    const bool few = blocks * inputs * int64_t(sizeof(Words)) <= ALONE;
#pragma omp parallel num_threads(few ? 1 : threads)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        // With several tiles of rows, all but the first tile read the weights of a step from the
        // cache. Each tile prefetches its share of the weights of the next step, to keep the memory
        // busy.
        const int64_t tiles = starts.size() - 1, block = inputs * int64_t(sizeof(Words));
        const int64_t step = tiles > 1 ? std::max(1, WIDE / Kind::weights) : end - begin;
        const char* all = reinterpret_cast<const char*>(weights);
        for (int64_t b = begin; b < end; b += step) {
            const int64_t stop = std::min(b + step, end), more = std::min(step, end - stop);
            for (int64_t t = 0; t < tiles; t++) {
                Ahead ahead{all + b * block + LATER, sizeof(Words)};
                if (tiles > 1 && more) {
                    const int64_t share = (int64_t(sizeof(Words)) + tiles - 1) / tiles;
                    ahead = {all + stop * block + more * block * t / tiles, share};
                } else if (tiles > 1) {
                    ahead = {all + b * block, 0};  // nothing left to prefetch: use cached weights
                }
                of_rows<Kind>(starts[t + 1] - starts[t], given + starts[t] * inputs, weights,
                              inputs, b, stop, ahead, output, starts[t]);
            }
        }
    }
}

// Split rows into as few tiles as possible; return the first row of each, then the number of rows.
// Tiles are equally large, unless full tiles leave at most FEW_ROWS rows: those form a tile of
// their own, which computes more outputs at a time.
std::vector<int64_t> tiled(int64_t rows) {
    const int64_t count = (rows + MOST_ROWS - 1) / MOST_ROWS, left = rows % MOST_ROWS;
    std::vector<int64_t> starts{0};
    for (int64_t t = 1; t <= count; t++) {
        starts.push_back(left <= FEW_ROWS ? std::min(t * MOST_ROWS, rows) : rows * t / count);
    }
    return starts;
}

// Copy rows of any strides as float32, each tile as [inputs, rows].
void lay_out(const View& rows, const std::vector<int64_t>& starts, int64_t inputs, float* into) {
    const bool half = rows.half();
    const int64_t last = rows.strides[rows.dimensions - 1];
    for (size_t t = 0; t + 1 < starts.size(); t++) {
        const int64_t number = starts[t + 1] - starts[t];
        float* tile_rows = into + starts[t] * inputs;
        for (int64_t r = 0; r < number; r++) {
            int64_t rest = starts[t] + r, offset = 0;
            for (int64_t d = rows.dimensions - 2; d >= 0; d--) {
                offset += rest % rows.sizes[d] * rows.strides[d];
                rest /= rows.sizes[d];
            }
            if (half) {
                const char* from = rows.data + 2 * offset;
                for (int64_t k = 0; k < inputs; k++) {
                    tile_rows[k * number + r] = widened(from + 2 * k * last);
                }
            } else {
                const float* from = reinterpret_cast<const float*>(rows.data) + offset;
                for (int64_t k = 0; k < inputs; k++) tile_rows[k * number + r] = from[k * last];
            }
        }
    }
}

// Compute gate * A x for each row; `gate` is 0 for rows without an update.
//
// starts: the tiles, as from `tiled`. laid_out: the rows, as from `lay_out`.
Update updates(const View& gate, const View& down, const View& up, const View& parts,
               const std::vector<int64_t>& starts, const std::vector<float>& laid_out,
               int64_t inputs, int threads) {
    const int64_t rows = starts.back(), numbers = down.numbers / (inputs ? inputs : 1);
    std::vector<float> factors(gate.numbers);
    for (int64_t r = 0; r < gate.numbers; r++) {
        const int64_t at = r * gate.strides[0];
        factors[r] = gate.half() ? widened(gate.data + 2 * at)
                                 : reinterpret_cast<const float*>(gate.data)[at];
    }
    const bool none = std::all_of(factors.begin(), factors.end(), [](float f) { return f == 0; });
    if (none || !numbers) return {};
    STD_TORCH_CHECK(gate.numbers == rows, "the gate is not one number for each row");
    static thread_local std::vector<float> made, low;
    made.resize(rows * numbers);
    low.resize(rows * numbers);
    const Output output{nullptr, nullptr, reinterpret_cast<char*>(made.data()), numbers, false, {}};
    multiply<BFloat16>(starts, laid_out.data(), reinterpret_cast<const uint32_t*>(down.data),
                       inputs, down.sizes[0], output, threads);
    for (size_t t = 0; t + 1 < starts.size(); t++) {
        const int64_t number = starts[t + 1] - starts[t];
        for (int64_t r = starts[t]; r < starts[t + 1]; r++) {
            float* into = low.data() + starts[t] * numbers + (r - starts[t]);
            for (int64_t k = 0; k < numbers; k++) {
                into[k * number] = factors[r] == 0 ? 0 : factors[r] * made[r * numbers + k];
            }
        }
    }
    return {low.data(), numbers, reinterpret_cast<const uint32_t*>(up.data),
            reinterpret_cast<const int64_t*>(parts.data), up.sizes[1]};
}

// Multiply all rows by weights of any type.
void multiply_by(const View& weights, const std::vector<int64_t>& starts, const float* given,
                 const Output& output, int threads) {
    const auto* words = reinterpret_cast<const uint32_t*>(weights.data);
    const int64_t blocks = weights.sizes[0], inputs = weights.sizes[1];
    if (weights.half()) {
        multiply<BFloat16>(starts, given, words, inputs, blocks, output, threads);
    } else if (weights.type == aoti_torch_dtype_int8()) {
        multiply<Int8>(starts, given, words, inputs, blocks, output, threads);
    } else {
        multiply<Float32>(starts, given, words, inputs, blocks, output, threads);
    }
}

const float* numbers_of(const View& scale) {
    return scale.numbers ? reinterpret_cast<const float*>(scale.data) : nullptr;
}

AtenTensorHandle product(AtenTensorHandle given, AtenTensorHandle gates, AtenTensorHandle packed,
                         AtenTensorHandle scales, AtenTensorHandle biases, AtenTensorHandle downs,
                         AtenTensorHandle ups, AtenTensorHandle places, int64_t width,
                         int64_t threads) {
    const View rows(given), weights(packed), scale(scales), bias(biases);
    const int64_t inputs = rows.width();
    STD_TORCH_CHECK(rows.half() || rows.full(), "rows must be bfloat16 or float32");
    STD_TORCH_CHECK(inputs == weights.sizes[1], "rows have not as many inputs as the weights");
    STD_TORCH_CHECK(!bias.numbers || bias.type == rows.type, "the bias is not of the rows' type");
    std::vector<int64_t> sizes(rows.sizes, rows.sizes + rows.dimensions);
    sizes.back() = width;
    const AtenTensorHandle made = empty(sizes.data(), rows.dimensions, rows.type);
    const int64_t number = inputs ? rows.numbers / inputs : 0;
    const std::vector<int64_t> starts = tiled(number);
    static thread_local std::vector<float> laid_out;
    laid_out.resize(number * inputs);
    lay_out(rows, starts, inputs, laid_out.data());
    const Update update = updates(View(gates), View(downs), View(ups), View(places), starts,
                                  laid_out, inputs, threads);
    const Output output{numbers_of(scale), bias.numbers ? bias.data : nullptr, View(made).data,
                        width, rows.half(), update};
    multiply_by(weights, starts, laid_out.data(), output, threads);
    return made;
}

using torch::stable::Tensor;

Tensor boxed(Tensor rows, Tensor gate, Tensor packed, Tensor scale, Tensor bias, Tensor down,
             Tensor up, Tensor parts, int64_t width, int64_t threads) {
    return Tensor(product(rows.get(), gate.get(), packed.get(), scale.get(), bias.get(),
                          down.get(), up.get(), parts.get(), width, threads));
}

}  // namespace

void multiply_rows(const float* rows, int64_t number, const View& weights, const View& scale,
                   float* made, int64_t width, int threads) {
    const int64_t inputs = weights.sizes[1];
    const std::vector<int64_t> starts = tiled(number);
    static thread_local std::vector<float> laid_out;
    laid_out.resize(number * inputs);
    for (size_t t = 0; t + 1 < starts.size(); t++) {
        const int64_t count = starts[t + 1] - starts[t];
        float* into = laid_out.data() + starts[t] * inputs;
        for (int64_t r = 0; r < count; r++) {
            const float* from = rows + (starts[t] + r) * inputs;
            for (int64_t k = 0; k < inputs; k++) into[k * count + r] = from[k];
        }
    }
    const Output output{numbers_of(scale), nullptr, reinterpret_cast<char*>(made), width, false,
                        {}};
    multiply_by(weights, starts, laid_out.data(), output, threads);
}

// Entry point for compiled passes, which bypass torch's dispatcher.
extern "C" AOTITorchError aoti_torch_cpu_rows_product(
    AtenTensorHandle rows, AtenTensorHandle gate, AtenTensorHandle packed, AtenTensorHandle scale,
    AtenTensorHandle bias, AtenTensorHandle down, AtenTensorHandle up, AtenTensorHandle parts,
    int64_t width, int64_t threads, AtenTensorHandle* made) {
    try {
        *made = product(rows, gate, packed, scale, bias, down, up, parts, width, threads);
        return AOTI_TORCH_SUCCESS;
    } catch (...) {
        return AOTI_TORCH_FAILURE;
    }
}

STABLE_TORCH_LIBRARY_IMPL(passlm, CPU, library) {
    library.impl("rows_product", TORCH_BOX(&boxed));
}
