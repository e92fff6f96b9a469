// Messages with one source and one tag keep their order, so each kind of message has its own tag.
#pragma once

namespace mlpint::tag {

// The solver's kinds, on each level, are a point of the chain (a sweep that goes from rank to rank: the coarsest
// level's or the exact one), an F-point that crosses a rank border inside an interval, the end of an interval on its
// way back to the rank that started it, and a C-point, moved by C-relaxation or wanted for a residual.
constexpr int chain = 0, f_point = 1, interval_end = 2, c_point = 3, kinds = 4;
constexpr int of_level(int kind, int level) { return 64 + kinds * level + kind; }

constexpr int broadcast = 1, sum = 2;
constexpr int user = 16;  // first of those that Python may use, up to 63

}  // namespace mlpint::tag
