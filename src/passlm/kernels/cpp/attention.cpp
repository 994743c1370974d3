// Attention of a few rows over a KV cache, for CPUs; see layers/attention.py.
//
// Query heads that share keys and values are computed together, in float32. A row's sums run over
// the cache slots in order, and slots that the row does not see add exact zeros: its output does
// not depend on the other rows nor on the capacity of the cache, bit for bit.
//
// Either each sequence has a line of equally many rows, or all rows are packed into one line and
// `texts` holds the sequence of each.

#include <cmath>
#include <utility>
#include <vector>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int MOST_ROWS = 16;  // rows that are computed together
constexpr int TILE = 4;        // rows whose weighted values are summed together
constexpr int SHARES = 2;      // minimum number of parts of the work per thread
constexpr float UNSEEN = -1e30f;  // mask values up to this hide a slot

// Types of queries, keys and values, read and written one vector of 32-bit words at a time. A
// vector of bfloat16 is read as two: the numbers at even indices, then those at odd ones. Queries,
// keys, values and outputs all use that order.

struct Float32 {
    static constexpr int vectors = 1;
    static ALWAYS_INLINE void read(const char* from, Floats* into) {
        std::memcpy(into, from, sizeof(Floats));
    }
    static ALWAYS_INLINE void write(const Floats* from, char* into) {
        std::memcpy(into, from, sizeof(Floats));
    }
};

struct BFloat16 {
    static constexpr int vectors = 2;
    static ALWAYS_INLINE void read(const char* from, Floats* into) {
        Words words;
        std::memcpy(&words, from, sizeof(Words));
        into[0] = (Floats)(words << 16);
        into[1] = (Floats)(words & 0xffff0000u);
    }
    static ALWAYS_INLINE void write(const Floats* from, char* into) {
        uint32_t even[LANES], odd[LANES], words[LANES];
        std::memcpy(even, from, sizeof(even));
        std::memcpy(odd, from + 1, sizeof(odd));
        for (int i = 0; i < LANES; i++) {
            words[i] = (rounded(even[i]) >> 16) | (rounded(odd[i]) & 0xffff0000u);
        }
        std::memcpy(into, words, sizeof(words));
    }
};

// Add lanes of `a` that are `step` apart, and those of `b`; groups of `step` sums alternate between
// both.
template <int step, int... lane>
ALWAYS_INLINE Floats folded(Floats a, Floats b, std::integer_sequence<int, lane...>) {
    const Floats left = __builtin_shufflevector(
        a, b, ((lane / step) % 2 ? LANES + lane - step : lane)...);
    const Floats right = __builtin_shufflevector(
        a, b, ((lane / step) % 2 ? LANES + lane : lane + step)...);
    return left + right;
}

// Dot products of a query and `count` keys, each in its own lane when `count` is LANES.
//
// known: vectors of a head, or 0 to use `vectors`.
template <int count, int known>
ALWAYS_INLINE Floats dots(const Floats* query, const Floats* keys, int64_t vectors) {
    if constexpr (count == 1) {
        Floats sum = query[0] * keys[0];
        for (int64_t v = 1; v < (known ? known : vectors); v++) {
            sum = fused(query[v], keys[v], sum);
        }
        return sum;
    } else {
        const int64_t half = count / 2 * (known ? known : vectors);
        const Floats a = dots<count / 2, known>(query, keys, vectors);
        const Floats b = dots<count / 2, known>(query, keys + half, vectors);
        return folded<count / 2>(a, b, std::make_integer_sequence<int, LANES>());
    }
}

// Consecutive rows of one sequence.
struct Run {
    int64_t text;
    int64_t line, first;  // the line of rows, and the index of the first row in it
    int64_t rows;
};

struct Pass {
    View query, keys, values, mask;
    int64_t lines, heads, key_heads, rows, slots, width, blocks;
    float scale;
    const Floats* added;  // the mask, added to scores, [lines, rows, blocks]
    const char* seen;     // whether a row sees any slot of a block, [lines, rows, blocks]
    char* output;         // [lines, rows, heads, width]
    std::vector<Run> runs;
};

// Split rows by sequence. texts: the sequence of each row; if empty, each line is a sequence. most:
// number of sequences in the cache.
std::vector<Run> runs_of(const View& texts, int64_t lines, int64_t rows, int64_t most) {
    std::vector<Run> runs;
    if (!texts.numbers) {
        for (int64_t line = 0; line < lines; line++) runs.push_back({line, line, 0, rows});
        return runs;
    }
    const auto* text = reinterpret_cast<const int64_t*>(texts.data);
    for (int64_t n = 0; n < rows; n++) {
        STD_TORCH_CHECK(text[n] >= 0 && text[n] < most, "a row belongs to no cached sequence");
        if (runs.empty() || runs.back().text != text[n]) runs.push_back({text[n], 0, n, 0});
        runs.back().rows++;
    }
    return runs;
}

// Lay out the mask of each row, -inf beyond the last slot, and find which blocks each row sees.
void lay_out(Pass& pass, std::vector<Floats>& added, std::vector<char>& seen) {
    const View& mask = pass.mask;
    const int64_t rows = pass.lines * pass.rows;
    added.resize(rows * pass.blocks);
    seen.resize(rows * pass.blocks);
    for (int64_t n = 0; n < rows; n++) {
        auto* row = reinterpret_cast<float*>(added.data() + n * pass.blocks);
        std::fill(row + pass.slots, row + pass.blocks * LANES, -INFINITY);
        const int64_t line = mask.sizes[0] == 1 ? 0 : n / pass.rows;
        if (!mask.numbers) {
            std::fill(row, row + pass.slots, 0.0f);
        } else {
            const int64_t at = line * mask.strides[0] + n % pass.rows * mask.strides[2];
            if (mask.half()) {
                const char* from = mask.data + 2 * at;
                for (int64_t i = 0; i < pass.slots; i++) row[i] = widened(from + 2 * i);
            } else {
                std::memcpy(row, mask.data + 4 * at, 4 * pass.slots);
            }
        }
        for (int64_t b = 0; b < pass.blocks; b++) {
            bool any = false;
            for (int i = 0; i < LANES; i++) any |= row[b * LANES + i] > UNSEEN;
            seen[n * pass.blocks + b] = any;
        }
    }
    pass.added = added.data();
    pass.seen = seen.data();
}

ALWAYS_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Attention of some stacked rows of one run and one key head, from index `begin` to `end`. The
// stacked rows are the query heads that share the key head: those of the first row, then those of
// the second.
//
// known: vectors of a head; 0 if known at run time only.
template <class Kind, int known>
struct Rows {
    static constexpr int64_t bytes = sizeof(Floats) / LANES / Kind::vectors;  // bytes of a number

    const Pass& pass;
    const Run& run;
    int64_t key_head, begin, number, together, vectors;
    Floats* queries;   // [rows, vectors]
    Floats* unpacked;  // keys of a block, [LANES, vectors]
    Floats* scores;    // [rows, blocks]; then weights
    std::vector<int64_t> blocks;  // seen by any of the rows
    float total[MOST_ROWS];

    Rows(const Pass& pass, const Run& run, int64_t key_head, int64_t begin, int64_t end,
         std::vector<Floats>& room)
        : pass(pass), run(run), key_head(key_head), begin(begin), number(end - begin),
          together(pass.heads / pass.key_heads), vectors(known ? known : padded(pass)) {
        room.resize((number + LANES) * vectors + number * pass.blocks);
        queries = room.data();
        unpacked = queries + number * vectors;
        scores = unpacked + LANES * vectors;
        for (int64_t b = 0; b < pass.blocks; b++) {
            bool any = false;
            for (int64_t n = row(0); n <= row(number - 1); n++) {
                any |= pass.seen[n * pass.blocks + b] != 0;
            }
            if (any) blocks.push_back(b);
        }
    }

    static int64_t padded(const Pass& pass) {
        const int64_t together = LANES * Kind::vectors;
        return (pass.width + together - 1) / together * Kind::vectors;
    }

    int64_t in_line(int64_t r) const { return run.first + (begin + r) / together; }
    int64_t row(int64_t r) const { return run.line * pass.rows + in_line(r); }
    int64_t head(int64_t r) const { return key_head * together + (begin + r) % together; }

    static const char* place(const View& of, int64_t first, int64_t head, int64_t at) {
        return of.data +
               bytes * (first * of.strides[0] + head * of.strides[1] + at * of.strides[2]);
    }

    // Read the numbers of a head from vector `v` on, as many as `Kind` reads at a time, padded with
    // zeros.
    ALWAYS_INLINE void read(const char* from, int64_t v, Floats* into) const {
        const int64_t start = v * LANES * bytes, whole = Kind::vectors * LANES * bytes;
        const int64_t left = known ? whole : pass.width * bytes - start;
        if (left >= whole) {
            Kind::read(from + start, into);
        } else {
            char part[Kind::vectors * LANES * bytes] = {};
            std::memcpy(part, from + start, left);
            Kind::read(part, into);
        }
    }

    ALWAYS_INLINE void write(const Floats* from, int64_t v, char* into) const {
        const int64_t start = v * LANES * bytes, whole = Kind::vectors * LANES * bytes;
        const int64_t left = known ? whole : pass.width * bytes - start;
        if (left >= whole) {
            Kind::write(from, into + start);
        } else {
            char part[Kind::vectors * LANES * bytes];
            Kind::write(from, part);
            std::memcpy(into + start, part, left);
        }
    }

    void read_all(const char* from, Floats* into) const {
        for (int64_t v = 0; v < vectors; v += Kind::vectors) read(from, v, into + v);
    }

    void score() {
        for (int64_t r = 0; r < number; r++) {
            read_all(place(pass.query, run.line, head(r), in_line(r)), queries + r * vectors);
            for (int64_t v = 0; v < vectors; v++) queries[r * vectors + v] *= pass.scale;
        }
        for (int64_t b : blocks) {
            for (int64_t i = 0; i < LANES; i++) {
                const int64_t slot = std::min(b * LANES + i, pass.slots - 1);
                read_all(place(pass.keys, run.text, key_head, slot), unpacked + i * vectors);
            }
            for (int64_t r = 0; r < number; r++) {
                scores[r * pass.blocks + b] =
                    dots<LANES, known>(queries + r * vectors, unpacked, vectors) +
                    pass.added[row(r) * pass.blocks + b];
            }
        }
    }

    void weigh() {
        for (int64_t r = 0; r < number; r++) {
            Floats* own = scores + r * pass.blocks;
            Floats most = Floats{} - INFINITY, sum = {};
            for (int64_t b : blocks) most = larger(most, own[b]);
            float largest = most[0];
            for (int i = 1; i < LANES; i++) largest = std::max(largest, most[i]);
            for (int64_t b : blocks) {  // the output of a row that sees nothing is zero
                own[b] = largest > UNSEEN ? exponential(own[b] - largest) : Floats{};
                sum += own[b];
            }
            total[r] = 0;
            for (int i = 0; i < LANES; i++) total[r] += sum[i];
        }
    }

    template <int count>
    void mix(int64_t first) const {
        constexpr int vectors_at_once = known == 4 ? 4 : Kind::vectors;
        for (int64_t v = 0; v < vectors; v += vectors_at_once) {
            Floats sums[count][vectors_at_once] = {};
            for (int64_t b : blocks) {
                const float* weights[count];
                for (int r = 0; r < count; r++) {
                    weights[r] = reinterpret_cast<const float*>(scores + (first + r) * pass.blocks + b);
                }
                const int64_t slots = std::min<int64_t>(LANES, pass.slots - b * LANES);
                const char* from = place(pass.values, run.text, key_head, b * LANES);
                for (int64_t i = 0; i < slots; i++, from += bytes * pass.values.strides[2]) {
                    Floats value[vectors_at_once];
                    for (int k = 0; k < vectors_at_once; k += Kind::vectors) {
                        read(from, v + k, value + k);
                    }
                    for (int r = 0; r < count; r++) {
                        for (int k = 0; k < vectors_at_once; k++) {
                            sums[r][k] = fused(value[k], spread(weights[r][i]), sums[r][k]);
                        }
                    }
                }
            }
            for (int r = 0; r < count; r++) {
                const float all = total[first + r] > 0 ? total[first + r] : 1.0f;
                const int64_t place = row(first + r) * pass.heads + head(first + r);
                char* into = pass.output + bytes * place * pass.width;
                for (int k = 0; k < vectors_at_once; k++) sums[r][k] /= all;
                for (int k = 0; k < vectors_at_once; k += Kind::vectors) {
                    write(sums[r] + k, v + k, into);
                }
            }
        }
    }

    void attend() {
        score();
        weigh();
        int64_t first = 0;
        for (; first + TILE <= number; first += TILE) mix<TILE>(first);
        for (; first < number; first++) mix<1>(first);
    }
};

// A part of the work: some of the stacked rows of a run and one key head.
struct Part {
    const Run* run;
    int64_t key_head, begin, end;
};

template <class Kind, int known>
void attend_all(const Pass& pass, int64_t threads) {
    const int64_t together = pass.heads / pass.key_heads;
    const int64_t pairs = std::max<int64_t>(1, pass.runs.size() * pass.key_heads);
    std::vector<Part> all;
    for (const Run& run : pass.runs) {
        const int64_t stacked = together * run.rows;
        const int64_t parts = std::max((stacked + MOST_ROWS - 1) / MOST_ROWS,
                                       std::min(stacked, (SHARES * threads + pairs - 1) / pairs));
        for (int64_t head = 0; head < pass.key_heads; head++) {
            for (int64_t part = 0; part < parts; part++) {
                all.push_back({&run, head, stacked * part / parts, stacked * (part + 1) / parts});
            }
        }
    }
    const int64_t parts = all.size();
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<Floats> room;
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < parts; n++) {
            const Part& part = all[n];
            Rows<Kind, known>(pass, *part.run, part.key_head, part.begin, part.end, room).attend();
        }
    }
}

template <class Kind>
void attend_all(const Pass& pass, int64_t threads) {
    if (pass.width == 4 * LANES) {
        attend_all<Kind, 4>(pass, threads);
    } else if (pass.width == 8 * LANES) {
        attend_all<Kind, 8>(pass, threads);
    } else {
        attend_all<Kind, 0>(pass, threads);
    }
}

AtenTensorHandle attention(AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values,
                           AtenTensorHandle mask, AtenTensorHandle texts, double scale,
                           int64_t threads) {
    Pass pass{View(query), View(keys), View(values), View(mask), 0, 0, 0, 0, 0, 0, 0,
              float(scale), nullptr, nullptr, nullptr, {}};
    const View text(texts);
    const int64_t* sizes = pass.query.sizes;
    pass.lines = sizes[0], pass.heads = sizes[1], pass.rows = sizes[2], pass.width = sizes[3];
    pass.key_heads = pass.keys.sizes[1], pass.slots = pass.keys.sizes[2];
    pass.blocks = (pass.slots + LANES - 1) / LANES;
    STD_TORCH_CHECK(pass.query.half() || pass.query.full(), "queries must be bfloat16 or float32");
    STD_TORCH_CHECK(pass.keys.type == pass.query.type && pass.values.type == pass.query.type,
                    "keys and values must have the type of the queries");
    STD_TORCH_CHECK(pass.query.strides[3] == 1 && pass.keys.strides[3] == 1 &&
                        pass.values.strides[3] == 1,
                    "the numbers of a head must be contiguous");
    STD_TORCH_CHECK(!pass.mask.numbers || (pass.mask.strides[3] == 1 &&
                                           (pass.mask.half() || pass.mask.full())),
                    "a mask must be bfloat16 or float32, with contiguous slots");
    STD_TORCH_CHECK(!text.numbers || (pass.lines == 1 && text.numbers == pass.rows &&
                                      text.type == aoti_torch_dtype_int64() &&
                                      text.dimensions == 1 && text.strides[0] == 1),
                    "texts must be one int64 number for each row of a single line");
    STD_TORCH_CHECK(text.numbers || pass.lines == pass.keys.sizes[0],
                    "queries and keys must have the same number of sequences");
    for (int d = 0; d < 4; d++) {
        STD_TORCH_CHECK(pass.values.sizes[d] == pass.keys.sizes[d],
                        "keys and values must have the same shape");
    }
    STD_TORCH_CHECK(!pass.mask.numbers ||
                        (pass.mask.sizes[2] == pass.rows && pass.mask.sizes[3] == pass.slots &&
                         (pass.mask.sizes[0] == 1 || pass.mask.sizes[0] == pass.lines)),
                    "a mask must have one number for each row and slot");
    pass.runs = runs_of(text, pass.lines, pass.rows, pass.keys.sizes[0]);
    static thread_local std::vector<Floats> added;
    static thread_local std::vector<char> seen;
    lay_out(pass, added, seen);
    const int64_t shape[] = {pass.lines, pass.rows, pass.heads, pass.width};
    const AtenTensorHandle made = empty(shape, 4, pass.query.type);
    pass.output = View(made).data;
    if (pass.query.half()) {
        attend_all<BFloat16>(pass, threads);
    } else {
        attend_all<Float32>(pass, threads);
    }
    return made;
}

using torch::stable::Tensor;

Tensor boxed(Tensor query, Tensor keys, Tensor values, Tensor mask, Tensor texts, double scale,
             int64_t threads) {
    return Tensor(attention(query.get(), keys.get(), values.get(), mask.get(), texts.get(), scale,
                            threads));
}

}  // namespace

// Entry point for compiled passes, which bypass torch's dispatcher.
extern "C" AOTITorchError aoti_torch_cpu_rows_attention(
    AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle mask,
    AtenTensorHandle texts, double scale, int64_t threads, AtenTensorHandle* made) {
    try {
        *made = attention(query, keys, values, mask, texts, scale, threads);
        return AOTI_TORCH_SUCCESS;
    } catch (...) {
        return AOTI_TORCH_FAILURE;
    }
}

STABLE_TORCH_LIBRARY_IMPL(passlm, CPU, library) {
    library.impl("rows_attention", TORCH_BOX(&boxed));
}
