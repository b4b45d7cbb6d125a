// Rows grouped by their output.
#pragma once

#include "matrix.h"

namespace mmcompress::cpu {

struct Groups {
  std::vector<int64_t> start, row;  // the rows of output j, ascending, are row[start[j]] … row[start[j + 1] - 1]
  Groups(const int64_t* assignment, int64_t num_rows, int64_t num_out);
};

}  // namespace mmcompress::cpu
