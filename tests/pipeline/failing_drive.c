/* A drive that fails on demand, below preadv: preloaded (LD_PRELOAD) into a process, it looks at every read of a
 * *.safetensors file opened with O_DIRECT, and at every read and write of a file without a name that was opened so, in
 * which KV pages are; it leaves all others alone. What it does stands in the file named by
 * PIPO_FAILING_DRIVE, read anew at every such read, so that it can be changed while the process runs:
 *
 *     SERIAL KIND AFTER TIMES SECONDS OFFSET
 *
 * Of the reads since SERIAL changed, the first AFTER are sound and the next TIMES (-1: all) are of KIND: "eio",
 * "eagain", "enodev" fail; "short" reads one sector more than half; "stall" waits SECONDS before it reads; "flip"
 * inverts a bit of the byte at OFFSET of the file. With OFFSET above -1 only reads that cover it count; with -2 only
 * repetitions of the first one that is of KIND, from then on, whatever other threads read meanwhile. "einval-open"
 * refuses O_DIRECT when a file is opened, as some file systems do. KV pages: "kv-read-eio", "kv-read-flip" (the first
 * byte) and "kv-write-enospc". Anything else, or no such file: sound.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct fault {
    long serial, after, times, offset;
    double seconds;
    char kind[32];
};

typedef ssize_t (*preadv2_function)(int, const struct iovec *, int, off_t, int);
typedef int (*open_function)(const char *, int, ...);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long current_serial = -1, counted = 0;
static off_t first_struck = -1;

static int load(struct fault *fault) {
    const char *path = getenv("PIPO_FAILING_DRIVE");
    char text[256];
    int descriptor = path ? ((open_function)dlsym(RTLD_NEXT, "open"))(path, O_RDONLY | O_CLOEXEC) : -1;
    if (descriptor < 0)
        return 0;
    ssize_t length = read(descriptor, text, sizeof text - 1);
    close(descriptor);
    text[length > 0 ? length : 0] = 0;
    return sscanf(text, "%ld %31s %ld %ld %lf %ld", &fault->serial, fault->kind, &fault->after, &fault->times,
                  &fault->seconds, &fault->offset) == 6;
}

static int is_store(const char *path) {
    size_t length = strlen(path);
    return length > 12 && strcmp(path + length - 12, ".safetensors") == 0;
}

/* The kind of file: 's'tore, 'k'V pages, or 0. */
static int is_watched(int descriptor) {
    char link[64], path[4096];
    int flags = fcntl(descriptor, F_GETFL);
    if (flags < 0 || !(flags & O_DIRECT))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (is_store(path))
        return 's';
    return length > 10 && !strcmp(path + length - 10, " (deleted)") && strstr(path, "/#") ? 'k' : 0;
}

/* Whether this request, a "read" or a "write" of a file of this kind, is one of those that fail. */
static int is_meant(const struct fault *fault, int file, const char *request) {
    int of_pages = !strncmp(fault->kind, "kv-", 3);
    if (of_pages != (file == 'k'))
        return 0;
    return of_pages ? !strncmp(fault->kind + 3, request, strlen(request)) : !strcmp(request, "read");
}

/* Whether this read is one of those that fail. */
static int strikes(const struct fault *fault, size_t size, off_t offset) {
    if (fault->offset >= 0 && (fault->offset < offset || fault->offset >= offset + (off_t)size))
        return 0;
    pthread_mutex_lock(&lock);
    if (fault->serial != current_serial) {
        current_serial = fault->serial;
        counted = 0;
        first_struck = -1;
    }
    int is_other = fault->offset == -2 && first_struck >= 0 && offset != first_struck;
    long number = is_other ? -1 : counted++;
    int is_struck = number >= fault->after && (fault->times < 0 || number < fault->after + fault->times);
    if (is_struck && first_struck < 0)
        first_struck = offset;
    pthread_mutex_unlock(&lock);
    return is_struck;
}

ssize_t preadv2(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags) {
    preadv2_function real = (preadv2_function)dlsym(RTLD_NEXT, "preadv2");
    struct fault fault;
    int file = count == 1 ? is_watched(descriptor) : 0;
    if (!file || !load(&fault) || !is_meant(&fault, file, "read") || !strikes(&fault, vectors->iov_len, offset))
        return real(descriptor, vectors, count, offset, flags);
    if (!strcmp(fault.kind, "kv-read-eio")) {
        errno = EIO;
        return -1;
    }
    if (!strcmp(fault.kind, "eio") || !strcmp(fault.kind, "eagain") || !strcmp(fault.kind, "enodev")) {
        errno = fault.kind[1] == 'i' ? EIO : fault.kind[1] == 'a' ? EAGAIN : ENODEV;
        return -1;
    }
    struct iovec vector = *vectors;
    if (!strcmp(fault.kind, "short") && vector.iov_len > 4096)
        vector.iov_len = vector.iov_len / 2 / 512 * 512 + 512;
    if (!strcmp(fault.kind, "stall")) {
        struct timespec pause = {(time_t)fault.seconds, (long)((fault.seconds - (long)fault.seconds) * 1e9)};
        nanosleep(&pause, NULL);
    }
    ssize_t result = real(descriptor, &vector, 1, offset, flags);
    if (!strcmp(fault.kind, "flip") && result > 0 && fault.offset >= offset && fault.offset < offset + result)
        ((char *)vector.iov_base)[fault.offset - offset] ^= 0x10;
    if (!strcmp(fault.kind, "kv-read-flip") && result > 0)
        ((char *)vector.iov_base)[0] ^= 0x10;
    return result;
}

ssize_t pwritev2(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags) {
    preadv2_function real = (preadv2_function)dlsym(RTLD_NEXT, "pwritev2");
    struct fault fault;
    int file = count == 1 ? is_watched(descriptor) : 0;
    if (!file || !load(&fault) || !is_meant(&fault, file, "write") || !strikes(&fault, vectors->iov_len, offset))
        return real(descriptor, vectors, count, offset, flags);
    errno = ENOSPC;
    return -1;
}

ssize_t pwritev64v2(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags) {
    return pwritev2(descriptor, vectors, count, offset, flags);
}

ssize_t pwritev(int descriptor, const struct iovec *vectors, int count, off_t offset) {
    return pwritev2(descriptor, vectors, count, offset, 0);
}

ssize_t pwritev64(int descriptor, const struct iovec *vectors, int count, off_t offset) {
    return pwritev2(descriptor, vectors, count, offset, 0);
}

ssize_t preadv64v2(int descriptor, const struct iovec *vectors, int count, off_t offset, int flags) {
    return preadv2(descriptor, vectors, count, offset, flags);
}

ssize_t preadv(int descriptor, const struct iovec *vectors, int count, off_t offset) {
    return preadv2(descriptor, vectors, count, offset, 0);
}

ssize_t preadv64(int descriptor, const struct iovec *vectors, int count, off_t offset) {
    return preadv2(descriptor, vectors, count, offset, 0);
}

static int refuses(const char *path, int flags) {
    struct fault fault;
    return (flags & O_DIRECT) && is_store(path) && load(&fault) && !strcmp(fault.kind, "einval-open");
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    if (refuses(path, flags)) {
        errno = EINVAL;
        return -1;
    }
    return ((open_function)dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    return open64(path, flags, mode);
}
