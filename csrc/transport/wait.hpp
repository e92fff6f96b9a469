// poll_until waits for a transfer that can only be polled.
#pragma once

#include <functional>

namespace mlpint {

// The hook runs now and then while a rank waits, outside the fast path, and may throw (keyboard interrupt). The
// bindings install it once.
std::function<void()>& wait_hook();

// Polls until done, and returns false if `seconds` passed first. It spins for a while and then sleeps between polls:
// ranks may outnumber cores, and an MPI that only ever spins makes them crawl. `watch` runs together with the wait
// hook, and is told the seconds since the wait began.
bool poll_until(const std::function<bool()>& done, double seconds, const std::function<void(double waited)>& watch);

}  // namespace mlpint
