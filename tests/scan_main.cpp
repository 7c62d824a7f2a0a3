// Runs the header scan over many buffers, for sanitizers: test_bad_files.py builds and feeds it.
// stdin: u64 length and bytes of each; stdout: a line for each, "accept" or "refuse".
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "../native/gguf_index.h"

int main() {
    uint64_t length = 0;
    while (std::fread(&length, sizeof length, 1, stdin) == 1) {
        // exactly as long as the file, so that a byte read past its end is seen
        uint8_t * data = static_cast<uint8_t *>(std::malloc(length));
        if (std::fread(data, 1, length, stdin) != length) {
            return 2;
        }
        try {
            mrrope::scan_gguf(data, length, length);
            std::puts("accept");
        } catch (const mrrope::GgufError &) {
            std::puts("refuse");
        }
        std::free(data);
    }
    return 0;
}
