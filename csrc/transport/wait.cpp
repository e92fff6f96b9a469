#include "wait.hpp"

#include <chrono>
#include <thread>

namespace mlpint {

std::function<void()>& wait_hook() {
  static std::function<void()> hook;
  return hook;
}

bool poll_until(const std::function<bool()>& done, double seconds, const std::function<void(double waited)>& watch) {
  using Clock = std::chrono::steady_clock;
  constexpr int spins = 20000;
  constexpr auto nap = std::chrono::microseconds(20);
  constexpr auto hook_interval = std::chrono::milliseconds(50);
  for (int i = 0; i < spins; ++i)
    if (done()) return true;
  const auto start = Clock::now();
  const auto limit = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  auto next_hook = start;
  while (!done()) {
    const auto now = Clock::now();
    if (now >= limit) return false;
    if (now >= next_hook) {
      if (wait_hook()) wait_hook()();
      watch(std::chrono::duration<double>(now - start).count());
      next_hook = now + hook_interval;
    }
    std::this_thread::sleep_for(nap);
  }
  return true;
}

}  // namespace mlpint
