// Splitting a range of rows over a few threads that live for one call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

namespace mrrope {

// How many threads to use for n_rows rows of row_bytes: n_threads if it is positive, else as many as the CPU has but
// each with a megabyte at least, under which starting one costs more than it saves.
inline int pick_threads(int n_threads, int64_t n_rows, size_t row_bytes) {
    const double megabytes = (double) n_rows * (double) row_bytes / (1 << 20);
    static const double cpus = std::max(1u, std::thread::hardware_concurrency());  // asking takes microseconds
    const double wanted = n_threads > 0 ? n_threads : std::min(cpus, std::max(1.0, megabytes));
    return (int) std::min(wanted, std::max(1.0, (double) n_rows));
}

// Calls work(thread, begin, end) on even parts of [0, n_rows), part 0 in the calling thread. work must not throw.
// Where the system gives no more threads, the caller does their parts.
inline void for_each_part(int n_threads, int64_t n_rows, const std::function<void(int, int64_t, int64_t)> & work) {
    const auto part = [&](int i) { work(i, n_rows * i / n_threads, n_rows * (i + 1) / n_threads); };
    std::vector<std::thread> threads;
    threads.reserve((size_t) n_threads);
    int started = 1;
    try {
        for (; started < n_threads; started++) {
            threads.emplace_back(part, started);
        }
    } catch (const std::system_error &) {
    }
    part(0);
    for (int i = started; i < n_threads; i++) {
        part(i);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

}  // namespace mrrope
