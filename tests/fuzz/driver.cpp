// main() for compilers without libFuzzer: the same targets and mutator in a plain loop, without coverage.
// program [-runs=N] [-max_total_time=SECONDS] [-max_len=BYTES] [-seed=N] [-artifact_prefix=DIR/] FILE|DIR...
// Every file is run as it is; mutations of them follow, if there is a number of runs or seconds.
#include <csignal>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <unistd.h>
#include <vector>

#include "mutate.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t *, size_t, size_t, unsigned) __attribute__((weak));
extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

namespace {

constexpr unsigned SECONDS_PER_RUN = 5;
std::string artifact = "./";
const std::string * current = nullptr;
fuzz::Random bytes_random;

// Keeps what broke it.
void save() {
    if (current != nullptr) {
        const std::string path = artifact + "crash-" + std::to_string(std::hash<std::string>{}(*current));
        std::ofstream(path, std::ios::binary) << *current;
        std::fprintf(stderr, "the input was written to %s\n", path.c_str());
        current = nullptr;
    }
}

void on_signal(int number) {
    std::fprintf(stderr, "%s\n", number == SIGALRM ? "a run took too long" : "a check failed");
    save();
    _exit(70);
}

void run(const std::string & input) {
    current = &input;
    alarm(SECONDS_PER_RUN);
    // exactly as long as the input, so that a byte read past its end is seen
    const std::unique_ptr<uint8_t[]> copy(new uint8_t[input.size()]);
    std::memcpy(copy.get(), input.data(), input.size());
    LLVMFuzzerTestOneInput(copy.get(), input.size());
    current = nullptr;
}

std::string read(const std::filesystem::path & path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

void collect(const std::filesystem::path & path, std::vector<std::string> & out) {
    if (!std::filesystem::is_directory(path)) {
        out.push_back(read(path));
        return;
    }
    for (const auto & entry : std::filesystem::directory_iterator(path)) {
        collect(entry.path(), out);
    }
}

struct Options {
    uint64_t runs = 0, seconds = 0, max_len = 4096, seed = 1;
    std::vector<std::string> inputs;
};

Options parse_options(int argc, char ** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string given = argv[i];
        const auto value = [&](const char * name) -> const char * {
            const std::string wanted = std::string("-") + name + "=";
            return given.compare(0, wanted.size(), wanted) == 0 ? argv[i] + wanted.size() : nullptr;
        };
        if (const char * v = value("runs")) {
            options.runs = std::strtoull(v, nullptr, 10);
        } else if (const char * v = value("max_total_time")) {
            options.seconds = std::strtoull(v, nullptr, 10);
        } else if (const char * v = value("max_len")) {
            options.max_len = std::strtoull(v, nullptr, 10);
        } else if (const char * v = value("seed")) {
            options.seed = std::strtoull(v, nullptr, 10);
        } else if (const char * v = value("artifact_prefix")) {
            artifact = v;
        } else if (given[0] != '-') {
            collect(given, options.inputs);
        }  // libFuzzer's other options mean nothing here
    }
    return options;
}

std::string mutated(const std::string & from, size_t max, unsigned seed) {
    if (LLVMFuzzerCustomMutator == nullptr) {
        return fuzz::mutate_bytes(from, max, bytes_random);
    }
    std::string out = from;
    out.resize(std::max(max, from.size()));
    out.resize(LLVMFuzzerCustomMutator(reinterpret_cast<uint8_t *>(&out[0]), from.size(), out.size(), seed));
    return out;
}

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size) {
    const fuzz::Bytes out = fuzz::mutate_bytes(fuzz::Bytes(reinterpret_cast<char *>(data), size), max_size, bytes_random);
    std::memcpy(data, out.data(), out.size());
    return out.size();
}

int main(int argc, char ** argv) {
    const Options options = parse_options(argc, argv);
    std::signal(SIGABRT, on_signal);
    std::signal(SIGALRM, on_signal);
    if (__sanitizer_set_death_callback != nullptr) {
        __sanitizer_set_death_callback(save);
    }
    for (const std::string & input : options.inputs) {
        run(input);
    }
    fuzz::Random random(uint32_t(options.seed % 2147483646 + 1));
    bytes_random.seed(uint32_t(options.seed + 1));
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(options.seconds);
    uint64_t done = options.inputs.size();
    for (; !options.inputs.empty(); ++done) {
        if (options.seconds > 0 ? std::chrono::steady_clock::now() >= end : done >= options.runs) {
            break;
        }
        std::string input = options.inputs[random() % options.inputs.size()];
        for (unsigned left = 1 + random() % 3; left > 0; --left) {
            input = mutated(input, size_t(options.max_len), unsigned(random()));
        }
        run(input);
    }
    alarm(0);
    std::fprintf(stderr, "stat::number_of_executed_units: %llu\n", static_cast<unsigned long long>(done));
    return 0;
}
