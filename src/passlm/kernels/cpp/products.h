// What products.cpp computes, for other operators.

#pragma once

#include "vectors.h"

// Some rows times weights that are laid out in blocks.
//
// rows: [number, inputs]. scale: of each output, or empty. made: [number, width].
void multiply_rows(const float* rows, int64_t number, const View& weights, const View& scale,
                   float* made, int64_t width, int threads);
