/* System calls that fail as those of cluster file systems do, in one folder, for LD_PRELOAD.

   FAULT_FOLDER: paths that begin so are meant. FAULTS: " CALL=ERRNO CALL=ERRNO", read at each call. CALL is a name below,
   or fsync_folder; "write" fails once QUOTA bytes have been written. " nfs=1": a file that is open or mapped in this
   process, or whose path contains HELD, stays as .nfs_... when its name is removed, until it is closed. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(call, path)                                                                                               \
  do {                                                                                                                 \
    int number = fault(call, path);                                                                                    \
    if (number) { errno = number; return -1; }                                                                         \
  } while (0)

static long written;
static int removed;

static int fault(const char *call, const char *path) {
  const char *folder = getenv("FAULT_FOLDER"), *faults = getenv("FAULTS");
  if (!folder || !faults || strncmp(path, folder, strlen(folder))) return 0;
  char key[40];
  snprintf(key, sizeof key, " %s=", call);
  const char *found = strstr(faults, key);
  return found ? atoi(found + strlen(key)) : 0;
}

static const char *path_of(int file, char *buffer) {
  char link[40];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, buffer, PATH_MAX - 1);
  buffer[size < 0 ? 0 : size] = 0;
  return buffer;
}

static const char *join(int folder, const char *name, char *buffer) {
  if (name[0] == '/' || folder == AT_FDCWD) {
    snprintf(buffer, PATH_MAX, "%s", name);
  } else {
    path_of(folder, buffer);
    size_t size = strlen(buffer);
    snprintf(buffer + size, PATH_MAX - size, "/%s", name);
  }
  return buffer;
}

static int held(const char *path, int but) {
  char found[PATH_MAX], line[PATH_MAX + 200];
  const char *elsewhere = getenv("HELD");
  int file = 0;
  if (elsewhere && strstr(path, elsewhere)) return 1;
  for (; file < 1024; file++)
    if (file != but && !strcmp(path_of(file, found), path)) return 1;
  FILE *maps = fopen("/proc/self/maps", "r");
  while (maps && fgets(line, sizeof line, maps))
    if (strstr(line, path)) { fclose(maps); return 1; }
  if (maps) fclose(maps);
  return 0;
}

static int stays(const char *path) {
  const char *name = strrchr(path, '/');
  if (!name || !fault("nfs", path)) return 0;
  if (!strncmp(name, "/.nfs", 5)) { if (!held(path, -1)) return 0; errno = EBUSY; return -1; }
  if (!held(path, -1)) return 0;
  char other[PATH_MAX];
  snprintf(other, sizeof other, "%.*s/.nfs_%d_%s", (int)(name - path), path, removed++, name + 1);
  return REAL(rename)(path, other) ? -1 : 1;
}

int flock(int file, int operation) {
  char path[PATH_MAX];
  FAIL("flock", path_of(file, path));
  return REAL(flock)(file, operation);
}

int fsync(int file) {
  char path[PATH_MAX];
  struct stat status;
  FAIL(!fstat(file, &status) && S_ISDIR(status.st_mode) ? "fsync_folder" : "fsync", path_of(file, path));
  return REAL(fsync)(file);
}

int link(const char *from, const char *to) { FAIL("link", to); return REAL(link)(from, to); }
int symlink(const char *from, const char *to) { FAIL("symlink", to); return REAL(symlink)(from, to); }
int rename(const char *from, const char *to) { FAIL("rename", to); return REAL(rename)(from, to); }

ssize_t write(int file, const void *content, size_t size) {
  char path[PATH_MAX];
  const char *quota = getenv("QUOTA");
  if (quota && fault("write", path_of(file, path))) {
    if (written + (long)size > atol(quota)) FAIL("write", path);
    written += size;
  }
  return REAL(write)(file, content, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  char path[PATH_MAX];
  if (getenv("QUOTA") && fault("write", path_of(file, path))) return write(file, parts[0].iov_base, parts[0].iov_len);
  return REAL(writev)(file, parts, count);
}

int unlink(const char *path) {
  int stayed = stays(path);
  return stayed ? (stayed > 0 ? 0 : -1) : REAL(unlink)(path);
}

int unlinkat(int folder, const char *name, int flags) {
  char path[PATH_MAX];
  int stayed = flags & AT_REMOVEDIR ? 0 : stays(join(folder, name, path));
  return stayed ? (stayed > 0 ? 0 : -1) : REAL(unlinkat)(folder, name, flags);
}

int close(int file) {
  char path[PATH_MAX];
  const char *name = strrchr(path_of(file, path), '/');
  int gone = name && !strncmp(name, "/.nfs", 5) && fault("nfs", path) && !held(path, file);
  int status = REAL(close)(file);
  if (gone) REAL(unlink)(path);
  return status;
}
