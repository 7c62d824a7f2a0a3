// libFuzzer's hook: three mutations of four know the format, the rest are libFuzzer's own.
#include <algorithm>
#include <cstring>

#include "mutate.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    return seed % 4 == 0 ? LLVMFuzzerMutate(data, size, max_size) : gguf_mutate(data, size, max_size, seed);
}
