/* Counts what a process changes below one folder, and at the Nth such operation kills it, fails it, or signals it.
 *
 * Loaded with LD_PRELOAD. `injector_arm` starts it, from within the process; before that, calls pass through. One lock
 * is held from the count to the end of a call, so that operations have an order, which is that of the log.
 *
 * Kinds: o open to write, w write, f fsync, r rename, m mkdir, u unlink and rmdir, t truncate, a allocate, l link.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL_BEFORE, KILL_AFTER, KILL_HALF, FAIL, FAIL_FROM };

static int armed, action, value, log_fd = -1;
static long at, count;
static char root[PATH_MAX], kinds[16], match[PATH_MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static ssize_t real_write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    return real(fd, data, size);
}

/* `log` < 0: none. `what`: kill or signal (0 before, 1 after, 2 amid a write), 3 fail once, 4 fail from there on. */
void injector_arm(const char *folder, const char *which, const char *part, long number, int what, int how, int log) {
    snprintf(root, sizeof root, "%s", folder);
    snprintf(kinds, sizeof kinds, "%s", which);
    snprintf(match, sizeof match, "%s", part);
    at = number, action = what, value = how, log_fd = log, count = 0;
    armed = 1;
}

long injector_count(void) { return count; }

void injector_disarm(void) { armed = 0; }

static void of_descriptor(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, out, PATH_MAX - 1);
    out[size < 0 ? 0 : size] = 0;
}

static void absolute(int dir, const char *path, char *out) {
    char base[PATH_MAX];
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        of_descriptor(dir, base);
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) out[0] = 0;
}

static int below(const char *path) {
    size_t size = strlen(root);
    return !strncmp(path, root, size) && (path[size] == '/' || !path[size]);
}

typedef struct {
    int counted, hit;
} Call;

/* Counts a call if it is to be; the lock is then held until `end`. Gives an errno if the call is to fail. */
static int begin(Call *call, char kind, const char *path, const char *other) {
    call->counted = call->hit = 0;
    if (!below(path) && !(other && below(other))) return 0;
    if (kinds[0] && !strchr(kinds, kind)) return 0;
    if (match[0] && !strstr(path, match)) return 0;
    pthread_mutex_lock(&lock);
    call->counted = 1;
    count++;
    call->hit = at > 0 && (action == FAIL_FROM ? count >= at : count == at);
    if (!call->hit) return 0;
    if (action == KILL_BEFORE || (action == KILL_HALF && kind != 'w')) kill(getpid(), value);
    return action == FAIL || action == FAIL_FROM ? value : 0;
}

static void end(Call *call, int failed, char kind, const char *path, const char *other, long a, long b,
                const void *data) {
    if (!call->counted) return;
    int saved = errno;
    if (log_fd >= 0) {
        char line[2 * PATH_MAX + 64];
        char shown = failed ? kind + 'A' - 'a' : kind; /* upper case: the call failed */
        int size = snprintf(line, sizeof line, "%c\t%s\t%s\t%ld\t%ld\n", shown, path, other ? other : "", a, b);
        real_write(log_fd, line, size);
        for (long done = 0; data && !failed && done < b;) {
            ssize_t put = real_write(log_fd, (const char *)data + done, b - done);
            if (put <= 0) abort();
            done += put;
        }
    }
    if (call->hit && action == KILL_AFTER) kill(getpid(), value);
    pthread_mutex_unlock(&lock);
    errno = saved;
}

/* Declares `call`, and returns -1 with errno when the call is to fail. */
#define BEGIN(kind, path, other) \
    Call call; \
    int wrong = begin(&call, kind, path, other); \
    if (wrong) { \
        if (call.counted) pthread_mutex_unlock(&lock); \
        errno = wrong; \
        return -1; \
    }

/* A call on a path that has no size. */
#define WHOLE(kind, text, text2, expression) \
    BEGIN(kind, text, text2) \
    int result = (expression); \
    end(&call, result < 0, kind, text, text2, 0, 0, NULL); \
    return result

static long inode(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : (long)status.st_ino;
}

static int opens(int (*real)(int, const char *, int, mode_t), int dir, const char *path, int flags, mode_t mode) {
    if (!armed || !(flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))) return real(dir, path, flags, mode);
    char text[PATH_MAX];
    absolute(dir, path, text);
    BEGIN('o', text, NULL)
    int fd = real(dir, path, flags, mode);
    end(&call, fd < 0, 'o', text, NULL, flags & O_TRUNC ? 1 : 0, fd < 0 ? 0 : inode(fd), NULL);
    return fd;
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

static int real_openat(int dir, const char *path, int flags, mode_t mode) {
    static int (*real)(int, const char *, int, ...);
    if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64");
    return real(dir, path, flags, mode);
}

int open(const char *path, int flags, ...) {
    MODE(flags)
    return opens(real_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE(flags)
    return opens(real_openat, AT_FDCWD, path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...) {
    MODE(flags)
    return opens(real_openat, dir, path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...) {
    MODE(flags)
    return opens(real_openat, dir, path, flags, mode);
}

int creat(const char *path, mode_t mode) {
    return opens(real_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int creat64(const char *path, mode_t mode) {
    return opens(real_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

/* `offset` < 0: where the descriptor stands. */
static ssize_t writes(int fd, const void *data, size_t size, off_t offset) {
    static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
    if (!real_pwrite) real_pwrite = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    if (!armed) return offset < 0 ? real_write(fd, data, size) : real_pwrite(fd, data, size, offset);
    char text[PATH_MAX];
    of_descriptor(fd, text);
    BEGIN('w', text, NULL)
    int amid = call.hit && action == KILL_HALF;
    size_t part = amid ? size / 2 : size;
    ssize_t put = offset < 0 ? real_write(fd, data, part) : real_pwrite(fd, data, part, offset);
    if (amid) kill(getpid(), value);
    if (call.counted) {
        int saved = errno;
        long place = offset < 0 ? (long)lseek(fd, 0, SEEK_CUR) - put : (long)offset;
        errno = saved;
        end(&call, put < 0, 'w', text, NULL, place, put < 0 ? 0 : put, data);
    }
    return put;
}

ssize_t write(int fd, const void *data, size_t size) { return writes(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return writes(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return writes(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(writev);
    if (!armed || !number) return real(fd, parts, number);
    char text[PATH_MAX];
    of_descriptor(fd, text);
    if (!below(text)) return real(fd, parts, number);
    return writes(fd, parts[0].iov_base, parts[0].iov_len, -1); /* a short write: the caller goes on */
}

static int syncs(int (*real)(int), int fd) {
    if (!armed) return real(fd);
    char text[PATH_MAX];
    of_descriptor(fd, text);
    BEGIN('f', text, NULL)
    int result = real(fd);
    end(&call, result < 0, 'f', text, NULL, 0, inode(fd), NULL);
    return result;
}

int fsync(int fd) {
    REAL(fsync);
    return syncs(real, fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    return syncs(real, fd);
}

static int renames(int from, const char *a, int to, const char *b, unsigned flags) {
    static int (*real)(int, const char *, int, const char *, unsigned);
    if (!real) real = (int (*)(int, const char *, int, const char *, unsigned))dlsym(RTLD_NEXT, "renameat2");
    if (!armed) return real(from, a, to, b, flags);
    char text[PATH_MAX], text2[PATH_MAX];
    absolute(from, a, text);
    absolute(to, b, text2);
    WHOLE('r', text, text2, real(from, a, to, b, flags));
}

int rename(const char *a, const char *b) { return renames(AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int from, const char *a, int to, const char *b) { return renames(from, a, to, b, 0); }
int renameat2(int from, const char *a, int to, const char *b, unsigned flags) { return renames(from, a, to, b, flags); }

int mkdirat(int dir, const char *path, mode_t mode) {
    REAL(mkdirat);
    if (!armed) return real(dir, path, mode);
    char text[PATH_MAX];
    absolute(dir, path, text);
    WHOLE('m', text, NULL, real(dir, path, mode));
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat);
    if (!armed) return real(dir, path, flags);
    char text[PATH_MAX];
    absolute(dir, path, text);
    struct stat status;
    long number = fstatat(dir, path, &status, AT_SYMLINK_NOFOLLOW) ? 0 : (long)status.st_ino;
    BEGIN('u', text, NULL)
    int result = real(dir, path, flags);
    end(&call, result < 0, 'u', text, NULL, 0, number, NULL);
    return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    if (!armed) return real(fd, size);
    char text[PATH_MAX];
    of_descriptor(fd, text);
    BEGIN('t', text, NULL)
    int result = real(fd, size);
    end(&call, result < 0, 't', text, NULL, (long)size, 0, NULL);
    return result;
}

int truncate(const char *path, off_t size) {
    REAL(truncate);
    if (!armed) return real(path, size);
    char text[PATH_MAX];
    absolute(AT_FDCWD, path, text);
    BEGIN('t', text, NULL)
    int result = real(path, size);
    end(&call, result < 0, 't', text, NULL, (long)size, 0, NULL);
    return result;
}

int truncate64(const char *path, off64_t size) { return truncate(path, size); }
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

/* Gives the error, and leaves errno as it is. */
int posix_fallocate(int fd, off_t from, off_t size) {
    REAL(posix_fallocate);
    if (!armed) return real(fd, from, size);
    char text[PATH_MAX];
    of_descriptor(fd, text);
    Call call;
    int wrong = begin(&call, 'a', text, NULL);
    if (wrong) {
        if (call.counted) pthread_mutex_unlock(&lock);
        return wrong;
    }
    int result = real(fd, from, size);
    end(&call, result, 'a', text, NULL, (long)(from + size), 0, NULL);
    return result;
}

int posix_fallocate64(int fd, off64_t from, off64_t size) { return posix_fallocate(fd, from, size); }

int linkat(int from, const char *a, int to, const char *b, int flags) {
    REAL(linkat);
    if (!armed) return real(from, a, to, b, flags);
    char text[PATH_MAX], text2[PATH_MAX];
    absolute(from, a, text);
    absolute(to, b, text2);
    WHOLE('l', text, text2, real(from, a, to, b, flags));
}

int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }

/* Python's copies: failing here sends them to read and write. */
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t size, unsigned flags) {
    static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);
    if (!real) real = (ssize_t(*)(int, off64_t *, int, off64_t *, size_t, unsigned))dlsym(RTLD_NEXT, "copy_file_range");
    if (!armed) return real(in, a, out, b, size, flags);
    errno = EXDEV;
    return -1;
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    static ssize_t (*real)(int, int, off64_t *, size_t);
    if (!real) real = (ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64");
    if (!armed) return real(out, in, offset, size);
    errno = ENOTSOCK;
    return -1;
}
