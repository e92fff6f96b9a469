// Where says what this rank is doing, for error messages and traces.
#pragma once

namespace mlpint {

struct Where {
  const char* operation = "idle";
  int level = 0;
  int position = 0;   // depth along the direction of the solve
  int iteration = 0;  // from 1; 0 in exact sweeps
};

}  // namespace mlpint
