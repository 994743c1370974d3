// Vectors of LANES numbers, views of tensors from torch's C interface, and helpers of all kernels.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <immintrin.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

#define ALWAYS_INLINE inline __attribute__((always_inline))

// a * b + c, rounded once. Fused explicitly, because a compiler decides for each loop whether to
// fuse, and a row's results would then depend on the number of rows.
ALWAYS_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if LANES == 16
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// A vector with the same number in all lanes.
ALWAYS_INLINE Floats spread(float number) {
#if LANES == 16
    return (Floats)_mm512_set1_ps(number);
#else
    return (Floats)_mm256_set1_ps(number);
#endif
}

// exp of numbers that are at most 0, accurate to about one unit in the last place.
ALWAYS_INLINE Floats exponential(Floats x) {
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Integers far = x < -87.0f;
    const Floats whole = fused(x, spread(1.44269504f), spread(shift)) - shift;
    Floats rest = fused(whole, spread(-0.693359375f), x);
    rest = fused(whole, spread(2.12194440e-4f), rest);
    Floats power = spread(1.9875691500e-4f);
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                       5.0000001201e-1f}) {
        power = fused(power, rest, spread(next));
    }
    power = fused(power * rest, rest, rest) + 1.0f;
    const Integers exponent = __builtin_convertvector(whole, Integers) << 23;
    const Integers bits = (Integers)power + exponent;
    return (Floats)(bits & ~far);
}

// The bfloat16 at an address, as float32.
inline float widened(const char* bfloat16) {
    uint16_t bits;
    std::memcpy(&bits, bfloat16, 2);
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// Round a float32 word to bfloat16, ties to even. The result is in the upper half of the word; the
// lower half is not cleared.
inline uint32_t rounded(uint32_t word) {
    const bool number = (word & 0x7fffffffu) <= 0x7f800000u;
    return number ? word + 0x7fffu + ((word >> 16) & 1) : word | 0x400000u;
}

// Address, shape and type of a tensor. `half`: bfloat16, `full`: float32, `whole`: int64.
struct View {
    char* data;
    int64_t dimensions;
    int64_t* sizes;
    int64_t* strides;
    int64_t numbers;
    int32_t type;

    explicit View(AtenTensorHandle tensor) {
        void* start;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &start));
        data = static_cast<char*>(start);
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dimensions));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &numbers));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &type));
    }

    int64_t width() const { return sizes[dimensions - 1]; }
    bool half() const { return type == aoti_torch_dtype_bfloat16(); }
    bool full() const { return type == aoti_torch_dtype_float32(); }
    bool whole() const { return type == aoti_torch_dtype_int64(); }
};

// A new contiguous CPU tensor with uninitialized values.
inline AtenTensorHandle empty(const int64_t* sizes, int64_t dimensions, int32_t type) {
    int64_t strides[8];
    STD_TORCH_CHECK(dimensions >= 1 && dimensions <= 8, "a tensor has 1 to 8 dimensions here");
    strides[dimensions - 1] = 1;
    for (int64_t d = dimensions - 1; d > 0; d--) strides[d - 1] = strides[d] * sizes[d];
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, type,
                                                    aoti_torch_device_type_cpu(), 0, &made));
    return made;
}
