// Products of rows and weights (products.cpp), for use by other operators.

#pragma once

#include "vectors.h"

// Multiply rows by weights in the block layout of products.cpp.
//
// rows: [number, inputs]. scale: factor of each output, or empty. made: result, [number, width].
void multiply_rows(const float* rows, int64_t number, const View& weights, const View& scale,
                   float* made, int64_t width, int threads);
