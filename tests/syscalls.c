// Loaded before libc (LD_PRELOAD): writes down every change that this process makes below one directory, in order, and
// can make the nth of them fail. It sits under the Python and the C++ writer alike. See power_cut.py for what is done
// with the log. Each line is: name, descriptor or path, and what the call needs, separated by tabs; data in hex.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DESCRIPTORS 4096
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE* out;
static char root[4096];
static char watched[DESCRIPTORS];
static long fail_after = -1;
static int fail_with;

// Starts a log of what happens below `directory`; the call after the next `after` fails with `error` (after < 0: none).
void watch_calls(const char* directory, const char* log, long after, int error) {
    pthread_mutex_lock(&lock);
    if (out) fclose(out);
    snprintf(root, sizeof root, "%s/", directory);
    out = fopen(log, "we");
    setlinebuf(out);  // a forked process must not inherit lines that are still to be written
    fail_after = after;
    fail_with = error;
    pthread_mutex_unlock(&lock);
}

// A line of the caller's own.
void note(const char* text) {
    pthread_mutex_lock(&lock);
    fprintf(out, "note\t%s\n", text);
    pthread_mutex_unlock(&lock);
}

static int below(const char* path) {
    const size_t size = strlen(root);
    return out && (strncmp(path, root, size) == 0 || (strlen(path) == size - 1 && strncmp(path, root, size - 1) == 0));
}

// A path as the log names it: below the directory, which itself is the empty name.
static const char* name(const char* path) { return strlen(path) < strlen(root) ? "" : path + strlen(root); }

// Whether this call is the one to fail; all after it succeed again.
static int fails(void) {
    if (fail_after < 0 || fail_after-- != 0) return 0;
    errno = fail_with;
    return 1;
}

static int opened(int (*real)(const char*, int, ...), const char* path, int flags, mode_t mode) {
    if (!below(path) || (!(flags & (O_WRONLY | O_RDWR)) && (flags & O_DIRECTORY) != O_DIRECTORY))
        return real(path, flags, mode);
    pthread_mutex_lock(&lock);
    int fd = fails() ? -1 : real(path, flags, mode);
    if (fd >= 0 && fd < DESCRIPTORS) {
        watched[fd] = 1;
        fprintf(out, "%s\t%d\t%s\n", flags & O_CREAT ? "create" : "open", fd, name(path));
    }
    pthread_mutex_unlock(&lock);
    return fd;
}

int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return opened(REAL(open), path, flags, mode);
}

int open64(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return opened(REAL(open64), path, flags, mode);
}

int close(int fd) {
    if (fd >= 0 && fd < DESCRIPTORS) watched[fd] = 0;
    return REAL(close)(fd);
}

ssize_t write(int fd, const void* data, size_t size) {
    if (fd < 0 || fd >= DESCRIPTORS || !watched[fd]) return REAL(write)(fd, data, size);
    pthread_mutex_lock(&lock);
    const int failing = fails();
    const ssize_t written = REAL(write)(fd, data, failing ? size / 2 : size);  // a full disk takes a part
    if (written > 0) {
        fprintf(out, "write\t%d\t", fd);
        for (ssize_t i = 0; i < written; ++i) fprintf(out, "%02x", ((const unsigned char*)data)[i]);
        fprintf(out, "\n");
    }
    pthread_mutex_unlock(&lock);
    if (!failing) return written;
    errno = fail_with;
    return -1;
}

int fsync(int fd) {
    if (fd < 0 || fd >= DESCRIPTORS || !watched[fd]) return REAL(fsync)(fd);
    pthread_mutex_lock(&lock);
    const int result = fails() ? -1 : 0;  // a power cut is played, so nothing need reach the disk
    if (!result) fprintf(out, "fsync\t%d\n", fd);
    pthread_mutex_unlock(&lock);
    return result;
}

#define ON_PATH(call, format, ...)                     \
    pthread_mutex_lock(&lock);                         \
    const int result = fails() ? -1 : call;            \
    if (!result) fprintf(out, format, ##__VA_ARGS__); \
    pthread_mutex_unlock(&lock);                       \
    return result

int rename(const char* from, const char* to) {
    if (!below(from)) return REAL(rename)(from, to);
    ON_PATH(REAL(rename)(from, to), "rename\t%s\t%s\n", name(from), name(to));
}

int mkdir(const char* path, mode_t mode) {
    if (!below(path)) return REAL(mkdir)(path, mode);
    ON_PATH(REAL(mkdir)(path, mode), "mkdir\t%s\n", name(path));
}

int unlink(const char* path) {
    if (!below(path)) return REAL(unlink)(path);
    ON_PATH(REAL(unlink)(path), "unlink\t%s\n", name(path));
}

int rmdir(const char* path) {
    if (!below(path)) return REAL(rmdir)(path);
    ON_PATH(REAL(rmdir)(path), "unlink\t%s\n", name(path));
}

// How a tree is removed: names below an open directory, files and directories alike.
int unlinkat(int directory, const char* entry, int flags) {
    char link[64], path[8192];
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    const ssize_t size = entry[0] == '/' ? 0 : readlink(link, path, sizeof path / 2);
    if (size < 0) return REAL(unlinkat)(directory, entry, flags);
    snprintf(path + size, sizeof path - size, "%s%s", size ? "/" : "", entry);
    if (!below(path)) return REAL(unlinkat)(directory, entry, flags);
    ON_PATH(REAL(unlinkat)(directory, entry, flags), "unlink\t%s\n", name(path));
}

int renameat2(int from_directory, const char* from, int to_directory, const char* to, unsigned int flags) {
    if (!below(from)) return REAL(renameat2)(from_directory, from, to_directory, to, flags);
    ON_PATH(REAL(renameat2)(from_directory, from, to_directory, to, flags), "exchange\t%s\t%s\n", name(from), name(to));
}
