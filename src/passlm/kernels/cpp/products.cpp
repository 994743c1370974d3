// Products of a few rows with a matrix of weights, for CPUs; see kernels/linear.py.
//
// Decoding multiplies one to some twenty rows with every weight of the model. What that costs is
// reading the weights, as long as the rows' arithmetic keeps up: here weights are unpacked to
// float32 in registers, and each is multiplied with all rows before the next is read. An output is
// summed up over the inputs in their order by one chain of fused multiply-adds, whatever the number
// of rows: a row's result does not depend on the rows beside it, bit for bit.
//
// Weights lie in blocks of LANES words of 32 bits for each input: a word holds 1 float32, 2 bfloat16
// or 4 int8 weights of as many outputs, those of one word LANES outputs apart.
//
// Some rows may have an update, B A x (LoRA), which goes on where the sum over the inputs ends.

#include <vector>

#include <omp.h>

#include "products.h"

namespace {

constexpr int REGISTERS = LANES == 16 ? 32 : 16;
constexpr int WIDE = 4;    // vectors of outputs at a time, where rows are few
constexpr int NARROW = 2;  // where they are more
// Sums, weights and a row's number stay in registers.
constexpr int FEW_ROWS = (REGISTERS - WIDE - 1) / WIDE;
constexpr int MOST_ROWS = (REGISTERS - NARROW - 1) / NARROW;  // of one tile
// Bytes asked for before they are needed, into the first cache and into the second.
constexpr int SOON = 1024;
constexpr int LATER = 8192;
constexpr int64_t ALONE = 32768;  // bytes of weights that one thread reads faster than several

// What a word of weights holds.

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

// What is added to the sums of some rows: B times what A gave for them.

struct Update {
    const float* low;      // A x of all layers, 0 for rows without update: tiles of [numbers, rows]
    int64_t numbers;       // of a row; 0: no row has an update
    const uint32_t* up;    // B: blocks of bfloat16, [rank, LANES] each
    const int64_t* parts;  // for each LANES outputs, where the numbers of their layer begin
    int64_t rank;

    // B of some LANES outputs, for number `k` of their layer.
    Floats weights(int64_t lanes, int64_t k) const {
        Words words;
        std::memcpy(&words, up + (lanes / 2 * rank + k) * LANES, sizeof(Words));
        return lanes % 2 ? BFloat16::unpacked<1>(words) : BFloat16::unpacked<0>(words);
    }
};

// What becomes of the sums of some outputs: scaled, updated, the bias added, rounded to the type of
// the rows.

struct Output {
    const float* scale;  // null: 1; for whole blocks
    const char* bias;    // null: 0; of the type of `out`
    char* out;
    int64_t width;
    bool half;           // bfloat16, not float32
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

// Weights that are asked for, into the second cache, while others are multiplied.

struct Ahead {
    const char* from;
    int64_t bytes;  // for each vector of words that is multiplied

    void ask(int64_t word) const { __builtin_prefetch(from + word * bytes, 0, 2); }
};

// Some rows times `count` vectors of outputs, from vector `first` of a block on.
//
// rows: [inputs, rows], float32. weights: blocks, [inputs, LANES] each.
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

// Some rows times the blocks from `begin` to `end`; `ahead` begins with what is asked for meanwhile.
template <class Kind, int rows>
void tiles(const float* given, const uint32_t* weights, int64_t inputs, int64_t begin, int64_t end,
           const Ahead& ahead, const Output& output, int64_t row) {
    constexpr int count = rows <= FEW_ROWS ? WIDE : NARROW;
    constexpr int wide = Kind::weights * LANES;  // outputs of a block
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

template <class Kind, int rows = MOST_ROWS>
void of_rows(int64_t number, const float* given, const uint32_t* weights, int64_t inputs,
             int64_t begin, int64_t end, const Ahead& ahead, const Output& output, int64_t row) {
    if (number == rows) {
        tiles<Kind, rows>(given, weights, inputs, begin, end, ahead, output, row);
    } else if constexpr (rows > 1) {
        of_rows<Kind, rows - 1>(number, given, weights, inputs, begin, end, ahead, output, row);
    }
}

// All rows times all blocks; `starts` are the first rows of the tiles, and the end.
template <class Kind>
void multiply(const std::vector<int64_t>& starts, const float* given, const uint32_t* weights,
              int64_t inputs, int64_t blocks, const Output& output, int threads) {
    const bool few = blocks * inputs * int64_t(sizeof(Words)) <= ALONE;
#pragma omp parallel num_threads(few ? 1 : threads)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        // With several tiles of rows, weights are read again from the cache, not from memory, and
        // each tile asks for its part of those that the next step needs: memory works meanwhile.
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
                    ahead = {all + b * block, 0};  // nothing is left: what is there already
                }
                of_rows<Kind>(starts[t + 1] - starts[t], given + starts[t] * inputs, weights,
                              inputs, b, stop, ahead, output, starts[t]);
            }
        }
    }
}

// The first rows of tiles, and the end: as few tiles as can be, and as equal, but few rows that are
// left over by whole tiles are one of their own, with more outputs at a time.
std::vector<int64_t> tiled(int64_t rows) {
    const int64_t count = (rows + MOST_ROWS - 1) / MOST_ROWS, left = rows % MOST_ROWS;
    std::vector<int64_t> starts{0};
    for (int64_t t = 1; t <= count; t++) {
        starts.push_back(left <= FEW_ROWS ? std::min(t * MOST_ROWS, rows) : rows * t / count);
    }
    return starts;
}

// Rows of any strides as float32: each tile as [inputs, rows].
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

// Which rows have an update, and what it is of: `gate` is 0 for those without.
//
// starts: of the tiles of rows. laid_out: the rows, as `lay_out` left them.
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

// All rows times weights of any type.
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

// What compiled passes call, without torch's dispatcher between.
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
