// Counts the calls that touch files below one folder, and kills the process at the n-th, or has it fail or do half.
//
// Preloaded (LD_PRELOAD) into a Python that arms it with `fault_arm` in a forked child; what was counted lies in memory
// that parent and children share, so that it outlives a kill. Calls of other processes' children are not counted.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { KILL_BEFORE = 1, KILL_AFTER, KILL_HALF, FAIL, HALF, VANISH };

// what a call does, one letter: c(reate) o(pen) r(ead) w(rite) n(ame) s(ync) f(lush or close) a(llocate) m(ap) l(ock)
#define CALLS 65536
struct shared {
    long count;
    char kinds[CALLS];
    char names[CALLS][16];
};

static struct shared *told;
static char folder[PATH_MAX], victim[PATH_MAX];
static long folder_len, at;
static int how, number, lasting, armed_pid;
static const char *failing = "";  // kinds that fail from the n-th call on, where the fault lasts

__attribute__((constructor)) static void begin(void) {
    told = mmap(NULL, sizeof *told, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

// dir: real path of the folder. n: 0 only counts. kinds: what a lasting fault makes fail.
void fault_arm(const char *dir, long n, int mode, int error, int lasts, const char *kinds) {
    snprintf(folder, sizeof folder, "%s", dir);
    folder_len = (long) strlen(folder);
    at = n;
    how = mode;
    number = error;
    lasting = lasts;
    failing = strdup(kinds);
    memset(told->kinds, 0, sizeof told->kinds);
    told->count = 0;
    armed_pid = getpid();
}

// The file that VANISH deletes (n < 0) or cuts to n bytes.
void fault_victim(const char *path) { snprintf(victim, sizeof victim, "%s", path); }

void fault_disarm(void) { armed_pid = 0; }
long fault_count(void) { return told->count; }
char fault_kind(long n) { return told->kinds[n]; }
const char *fault_name(long n) { return told->names[n]; }

static int below(const char *path) {
    return !strncmp(path, folder, folder_len) && (path[folder_len] == '/' || path[folder_len] == 0);
}

static int fd_below(int fd) {
    char link[32], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (n < 0)
        return 0;
    path[n] = 0;
    return below(path);
}

static int path_below(int dir, const char *path) {
    if (path == NULL)
        return 0;
    if (path[0] == '/')
        return below(path);
    if (dir != AT_FDCWD)
        return fd_below(dir);
    char cwd[PATH_MAX];
    return syscall(SYS_getcwd, cwd, sizeof cwd) > 0 && below(cwd);
}

static void end(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

// What is to be done to a call that is counted now: 0 nothing, else one of the modes.
static int due(const char *name, char kind) {
    long n = __atomic_add_fetch(&told->count, 1, __ATOMIC_SEQ_CST);
    if (n < CALLS) {
        told->kinds[n] = kind;
        snprintf(told->names[n], sizeof told->names[n], "%s", name);
    }
    if (at == 0 || n < at || (n > at && !(lasting && strchr(failing, kind))))
        return 0;
    if (how == KILL_BEFORE)
        end();
    if (how == VANISH) {
        if (number < 0)
            syscall(SYS_unlinkat, AT_FDCWD, victim, 0);
        else
            syscall(SYS_truncate, victim, (long) number);
        return 0;
    }
    return how;
}

static int counted(void) { return armed_pid && armed_pid == getpid(); }

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name)) dlsym(RTLD_NEXT, #name)

// One call: `ours` says whether it is below the folder, `half` does half of it (or all, where there is no half).
#define FAULTY(type, label, kind, ours, call, half, close_anyway) \
    if (!counted() || !(ours)) \
        return call; \
    int mode = due(label, kind); \
    if (mode == FAIL) { \
        if (close_anyway) \
            (void) (call); \
        errno = number; \
        return (type) -1; \
    } \
    type got = (mode == HALF || mode == KILL_HALF) ? (half) : (call); \
    if (mode == KILL_AFTER || mode == KILL_HALF) \
        end(); \
    return got

#define MODE_OF(flags) \
    mode_t bits = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        bits = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE_OF(flags) \
        FAULTY(int, "open", flags & O_CREAT ? 'c' : 'o', path_below(AT_FDCWD, path), real(path, flags, bits), \
               real(path, flags, bits), 0); \
    }
#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(name); \
        MODE_OF(flags) \
        FAULTY(int, "openat", flags & O_CREAT ? 'c' : 'o', path_below(dir, path), real(dir, path, flags, bits), \
               real(dir, path, flags, bits), 0); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define HALF_OF(n) ((n) > 1 ? (n) / 2 : (n))

ssize_t read(int fd, void *data, size_t n) {
    REAL(read);
    FAULTY(ssize_t, "read", 'r', fd_below(fd), real(fd, data, n), real(fd, data, HALF_OF(n)), 0);
}
ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    FAULTY(ssize_t, "write", 'w', fd_below(fd), real(fd, data, n), real(fd, data, HALF_OF(n)), 0);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    FAULTY(ssize_t, "writev", 'w', fd_below(fd), real(fd, parts, n), real(fd, parts, HALF_OF(n)), 0);
}
ssize_t readv(int fd, const struct iovec *parts, int n) {
    REAL(readv);
    FAULTY(ssize_t, "readv", 'r', fd_below(fd), real(fd, parts, n), real(fd, parts, HALF_OF(n)), 0);
}
#define PREAD(name, offset) \
    ssize_t name(int fd, void *data, size_t n, offset place) { \
        REAL(name); \
        FAULTY(ssize_t, "pread", 'r', fd_below(fd), real(fd, data, n, place), real(fd, data, HALF_OF(n), place), 0); \
    }
#define PWRITE(name, offset) \
    ssize_t name(int fd, const void *data, size_t n, offset place) { \
        REAL(name); \
        FAULTY(ssize_t, "pwrite", 'w', fd_below(fd), real(fd, data, n, place), real(fd, data, HALF_OF(n), place), 0); \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    REAL(copy_file_range);
    FAULTY(ssize_t, "copy_file_range", 'a', fd_below(out) || fd_below(in), real(in, from, out, to, n, flags),
           real(in, from, out, to, HALF_OF(n), flags), 0);
}
#define SENDFILE(name, offset) \
    ssize_t name(int out, int in, offset *from, size_t n) { \
        REAL(name); \
        FAULTY(ssize_t, "sendfile", 'a', fd_below(out) || fd_below(in), real(out, in, from, n), \
               real(out, in, from, HALF_OF(n)), 0); \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)
ssize_t sendfile(int, int, off_t *, size_t);

#define SIMPLE(name, label, kind, params, ours, args) \
    int name params { \
        REAL(name); \
        FAULTY(int, label, kind, ours, real args, real args, 0); \
    }
SIMPLE(rename, "rename", 'n', (const char *a, const char *b), path_below(AT_FDCWD, a) || path_below(AT_FDCWD, b), (a, b))
SIMPLE(renameat, "renameat", 'n', (int d, const char *a, int e, const char *b), path_below(d, a) || path_below(e, b),
       (d, a, e, b))
SIMPLE(renameat2, "renameat2", 'n', (int d, const char *a, int e, const char *b, unsigned f),
       path_below(d, a) || path_below(e, b), (d, a, e, b, f))
SIMPLE(link, "link", 'n', (const char *a, const char *b), path_below(AT_FDCWD, b), (a, b))
SIMPLE(linkat, "linkat", 'n', (int d, const char *a, int e, const char *b, int f), path_below(e, b), (d, a, e, b, f))
SIMPLE(symlink, "symlink", 'n', (const char *a, const char *b), path_below(AT_FDCWD, b), (a, b))
SIMPLE(mkdir, "mkdir", 'n', (const char *path, mode_t mode_bits), path_below(AT_FDCWD, path), (path, mode_bits))
SIMPLE(mkdirat, "mkdirat", 'n', (int d, const char *path, mode_t mode_bits), path_below(d, path), (d, path, mode_bits))
SIMPLE(unlink, "unlink", 'u', (const char *path), path_below(AT_FDCWD, path), (path))
SIMPLE(unlinkat, "unlinkat", 'u', (int d, const char *path, int f), path_below(d, path), (d, path, f))
SIMPLE(rmdir, "rmdir", 'u', (const char *path), path_below(AT_FDCWD, path), (path))
SIMPLE(chmod, "chmod", 'u', (const char *path, mode_t mode_bits), path_below(AT_FDCWD, path), (path, mode_bits))
SIMPLE(fchmod, "fchmod", 'u', (int fd, mode_t mode_bits), fd_below(fd), (fd, mode_bits))
SIMPLE(utimensat, "utimensat", 'u', (int d, const char *path, const struct timespec t[2], int f), path_below(d, path),
       (d, path, t, f))
SIMPLE(ftruncate, "ftruncate", 'a', (int fd, off_t n), fd_below(fd), (fd, n))
SIMPLE(ftruncate64, "ftruncate", 'a', (int fd, off64_t n), fd_below(fd), (fd, n))
SIMPLE(truncate, "truncate", 'a', (const char *path, off_t n), path_below(AT_FDCWD, path), (path, n))
SIMPLE(truncate64, "truncate", 'a', (const char *path, off64_t n), path_below(AT_FDCWD, path), (path, n))
SIMPLE(fallocate, "fallocate", 'a', (int fd, int mode_bits, off_t from, off_t n), fd_below(fd), (fd, mode_bits, from, n))
SIMPLE(fallocate64, "fallocate", 'a', (int fd, int mode_bits, off64_t from, off64_t n), fd_below(fd),
       (fd, mode_bits, from, n))
SIMPLE(fsync, "fsync", 's', (int fd), fd_below(fd), (fd))
SIMPLE(fdatasync, "fdatasync", 's', (int fd), fd_below(fd), (fd))
SIMPLE(flock, "flock", 'l', (int fd, int operation), fd_below(fd), (fd, operation))

int close(int fd) {
    REAL(close);
    FAULTY(int, "close", 'f', fd_below(fd), real(fd), real(fd), 1);
}

int ioctl(int fd, unsigned long request, ...) {
    REAL(ioctl);
    va_list rest;
    va_start(rest, request);
    void *data = va_arg(rest, void *);
    va_end(rest);
    // FICLONE and FICLONERANGE, linux/fs.h
    FAULTY(int, "ioctl", 'a', (request == 0x40049409 || request == 0x4020940D) && fd_below(fd),
           real(fd, request, data), real(fd, request, data), 0);
}

#define MMAP(name, offset) \
    void *name(void *want, size_t n, int prot, int flags, int fd, offset place) { \
        REAL(name); \
        FAULTY(void *, "mmap", 'm', fd >= 0 && fd_below(fd), real(want, n, prot, flags, fd, place), \
               real(want, n, prot, flags, fd, place), 0); \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

// llama.cpp writes with stdio, whose own calls of write cannot be caught
#define FOPEN(name) \
    FILE *name(const char *path, const char *how_to) { \
        REAL(name); \
        if (!counted() || !path_below(AT_FDCWD, path)) \
            return real(path, how_to); \
        int mode = due("fopen", strpbrk(how_to, "wa+") ? 'c' : 'o'); \
        if (mode == FAIL) { \
            errno = number; \
            return NULL; \
        } \
        FILE *got = real(path, how_to); \
        if (mode == KILL_AFTER) \
            end(); \
        return got; \
    }
FOPEN(fopen)
FOPEN(fopen64)

// its own open cannot be caught either
DIR *opendir(const char *path) {
    REAL(opendir);
    if (!counted() || !path_below(AT_FDCWD, path))
        return real(path);
    int mode = due("opendir", 'o');
    if (mode == FAIL) {
        errno = number;
        return NULL;
    }
    DIR *got = real(path);
    if (mode == KILL_AFTER)
        end();
    return got;
}

size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
    REAL(fwrite);
    if (!counted() || !fd_below(fileno(file)))
        return real(data, size, n, file);
    int mode = due("fwrite", 'w');
    if (mode == FAIL) {
        errno = number;
        return 0;
    }
    if (mode == KILL_HALF) {
        real(data, 1, size * n / 2, file);
        fflush(file);
        end();
    }
    size_t got = real(data, size, n, file);
    if (mode == KILL_AFTER)
        end();
    return got;
}
size_t fread(void *data, size_t size, size_t n, FILE *file) {
    REAL(fread);
    if (!counted() || !fd_below(fileno(file)))
        return real(data, size, n, file);
    int mode = due("fread", 'r');
    if (mode == FAIL) {
        errno = number;
        return 0;
    }
    size_t got = real(data, size, n, file);
    if (mode == KILL_AFTER || mode == KILL_HALF)
        end();
    return got;
}
int fclose(FILE *file) {
    REAL(fclose);
    if (!counted() || !fd_below(fileno(file)))
        return real(file);
    int mode = due("fclose", 'f');
    int got = real(file);
    if (mode == KILL_AFTER)
        end();
    if (mode == FAIL) {
        errno = number;
        return EOF;
    }
    return got;
}
