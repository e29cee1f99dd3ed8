#pragma once

namespace moert {

// Whether the operators that this thread calls give a row the same bits whatever the other rows are.
inline thread_local bool batch_invariant = false;

}  // namespace moert
