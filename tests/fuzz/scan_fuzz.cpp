// The header scan on any bytes: it ends, stays within them, and what it accepts and refuses is of one piece.
#include "check.h"

namespace {

using fuzz::check_error;

bool scan(const uint8_t * data, size_t size, uint64_t file_size, mrrope::GgufHeader & header) {
    try {
        header = mrrope::scan_gguf(data, size, file_size);
    } catch (const mrrope::GgufError & error) {
        check_error(error, file_size);
        return false;
    }
    fuzz::check_header(data, size, file_size, header);
    return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    mrrope::GgufHeader whole, longer, longest;
    const bool accepted = scan(data, size, size, whole);
    // a header whose data were left out: more of a file than there was can only help
    const bool later = scan(data, size, size + (1ull << 40), longer);
    CHECK(!accepted || later);
    CHECK(!later || scan(data, size, UINT64_MAX, longest));
    if (accepted) {
        CHECK(whole.data_start == longer.data_start && whole.tensors.size() == longer.tensors.size());
    }
    return 0;
}
