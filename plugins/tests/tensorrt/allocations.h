// Counts what the process allocates with operator new, but for what emulated threads do. Always 0 with
// AddressSanitizer, which has operators of its own.
#pragma once

namespace trimkv::test {

long Allocations();

}  // namespace trimkv::test
