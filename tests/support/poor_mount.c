/* A folder as poor mounts show it (NFS without locks, gcsfuse, mountpoint-s3): no hard links, no flock, and a name that
   was absent stays absent for a minute to the process that looked, until that process makes it itself. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define KEPT_S 60
#define NAMES 4096

static struct { char path[PATH_MAX]; time_t since; } absent[NAMES];
static int count;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static const char *below(const char *path, char *full) {
    const char *folder = getenv("DETR_POOR_MOUNT");
    if (!folder || !path) return NULL;
    if (path[0] == '/') snprintf(full, PATH_MAX, "%s", path);
    else {
        char here[PATH_MAX / 2];
        if (!getcwd(here, sizeof here)) return NULL;
        snprintf(full, PATH_MAX, "%s/%s", here, path);
    }
    return strncmp(full, folder, strlen(folder)) ? NULL : full;
}

static int find(const char *full) {
    for (int i = 0; i < count; i++) if (!strcmp(absent[i].path, full)) return i;
    return -1;
}

static int is_absent(const char *full) {
    pthread_mutex_lock(&mutex);
    int i = find(full), known = i >= 0 && time(NULL) - absent[i].since < KEPT_S;
    pthread_mutex_unlock(&mutex);
    return known;
}

static void note(const char *full, int gone) {
    pthread_mutex_lock(&mutex);
    int i = find(full);
    if (gone && i < 0 && count < NAMES) i = count++, strcpy(absent[i].path, full), absent[i].since = 0;
    if (i >= 0 && (!gone || time(NULL) - absent[i].since >= KEPT_S)) absent[i].since = gone ? time(NULL) : 0;
    pthread_mutex_unlock(&mutex);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define STAT(name, ...)                                                                          \
    {                                                                                            \
        char full[PATH_MAX];                                                                     \
        const char *path = below(file, full);                                                    \
        if (path && is_absent(path)) return errno = ENOENT, -1;                                  \
        int result = REAL(name)(__VA_ARGS__), error = errno;                                     \
        if (path && result < 0 && error == ENOENT) note(path, 1);                                \
        return errno = error, result;                                                            \
    }

int stat(const char *file, struct stat *out) STAT(stat, file, out)
int lstat(const char *file, struct stat *out) STAT(lstat, file, out)
int stat64(const char *file, struct stat64 *out) STAT(stat64, file, out)
int lstat64(const char *file, struct stat64 *out) STAT(lstat64, file, out)

static int made(const char *file, int result) {
    int error = errno;
    char full[PATH_MAX];
    const char *path = below(file, full);
    if (path && result >= 0) note(path, 0);
    return errno = error, result;
}

#define OPEN(name, ...)                                                                          \
    {                                                                                            \
        va_list rest;                                                                            \
        va_start(rest, flags);                                                                   \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                  \
        va_end(rest);                                                                            \
        return made(file, REAL(name)(__VA_ARGS__, mode));                                        \
    }

int open(const char *file, int flags, ...) OPEN(open, file, flags)
int open64(const char *file, int flags, ...) OPEN(open64, file, flags)
int mkdir(const char *file, mode_t mode) { return made(file, REAL(mkdir)(file, mode)); }
int rename(const char *from, const char *file) { return made(file, REAL(rename)(from, file)); }

int link(const char *from, const char *file) {
    char full[PATH_MAX];
    if (below(file, full)) return errno = EPERM, -1;
    return REAL(link)(from, file);
}

int linkat(int from_folder, const char *from, int folder, const char *file, int flags) {
    char full[PATH_MAX];
    if (below(file, full)) return errno = EPERM, -1;
    return REAL(linkat)(from_folder, from, folder, file, flags);
}

int flock(int descriptor, int operation) {
    char name[64], path[PATH_MAX], full[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length > 0 && (path[length] = 0, below(path, full))) return errno = ENOLCK, -1;
    return REAL(flock)(descriptor, operation);
}
