/* A stand-in for the Neuron runtime, for tests on machines without one. It is no Neuron device: memory is host memory.
 *
 * It checks the order of calls (nothing before nrt_init but queries), every range and every handle; what was not given
 * back is counted: fake_live() says how much. fake_fail(name, status) lets the next call of that name fail.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct tensor {
    struct tensor *next;
    unsigned char *memory;
    size_t bytes;
} tensor;

enum { SUCCESS = 0, INVALID = 2, RESOURCE = 4, UNINITIALIZED = 13 };
#define CORES 2
#define MEMORY_BYTES (1ULL << 30)
/* Added to host addresses: such an address faults when it is used. */
#define DEVICE_BIT 0x4000000000000000ULL

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised;
static tensor *tensors;
static char failing[64];
static int failing_status;

void fake_fail(const char *call, int status)
{
    pthread_mutex_lock(&lock);
    snprintf(failing, sizeof failing, "%s", call);
    failing_status = status;
    pthread_mutex_unlock(&lock);
}

int fake_live(void)
{
    int live = 0;
    pthread_mutex_lock(&lock);
    for (tensor *each = tensors; each; each = each->next)
        live++;
    pthread_mutex_unlock(&lock);
    return live;
}

static int enter(const char *call, int query)
{
    pthread_mutex_lock(&lock);
    int status = initialised || query ? SUCCESS : UNINITIALIZED;
    if (strcmp(call, failing) == 0) {
        failing[0] = 0;
        status = failing_status;
    }
    if (status)
        pthread_mutex_unlock(&lock);
    return status;
}

#define ENTER(query) do { int status = enter(__func__, query); if (status) return status; } while (0)
#define LEAVE(status) do { int left = (status); pthread_mutex_unlock(&lock); return left; } while (0)

static int known(const tensor *which, size_t offset, size_t bytes)
{
    for (tensor *each = tensors; each; each = each->next)
        if (each == which)
            return offset <= each->bytes && bytes <= each->bytes - offset;
    return 0;
}

int nrt_init(int framework, const char *version, const char *layer)
{
    ENTER(1);
    if (initialised || framework != 1 || !version || !layer)
        LEAVE(INVALID);
    initialised = 1;
    LEAVE(SUCCESS);
}

typedef struct {
    uint64_t major, minor, patch, maintenance;
    char detail[128], hash[64];
} version;

int nrt_get_version(version *into, size_t bytes)
{
    ENTER(1);
    if (bytes != sizeof *into)
        LEAVE(INVALID);
    *into = (version){ 2, 31, 7, 0, "stand-in", "none" };
    LEAVE(SUCCESS);
}

int nrt_get_total_nc_count(uint32_t *count)
{
    ENTER(1);
    *count = CORES;
    LEAVE(SUCCESS);
}

int nrt_get_visible_nc_count(uint32_t *count)
{
    ENTER(1);
    *count = CORES - 1;
    LEAVE(SUCCESS);
}

int nrt_tensor_allocate(int placement, int core, size_t bytes, const char *name, tensor **new)
{
    ENTER(0);
    if (placement != 0 || core < 0 || core >= CORES || !name)
        LEAVE(INVALID);
    if (bytes > MEMORY_BYTES)
        LEAVE(RESOURCE);
    tensor *made = malloc(sizeof *made);
    *made = (tensor){ tensors, malloc(bytes), bytes };
    memset(made->memory, 0xa5, bytes);
    tensors = made;
    *new = made;
    LEAVE(SUCCESS);
}

void nrt_tensor_free(tensor **which)
{
    pthread_mutex_lock(&lock);
    for (tensor **at = &tensors; *at; at = &(*at)->next)
        if (*at == *which) {
            tensor *gone = *at;
            *at = gone->next;
            free(gone->memory);
            free(gone);
            *which = NULL;
            break;
        }
    if (*which)
        abort();
    pthread_mutex_unlock(&lock);
}

int nrt_tensor_read(const tensor *from, void *to, size_t offset, size_t bytes)
{
    ENTER(0);
    if (!known(from, offset, bytes))
        LEAVE(INVALID);
    memcpy(to, from->memory + offset, bytes);
    LEAVE(SUCCESS);
}

int nrt_tensor_write(tensor *to, const void *from, size_t offset, size_t bytes)
{
    ENTER(0);
    if (!known(to, offset, bytes))
        LEAVE(INVALID);
    memcpy(to->memory + offset, from, bytes);
    LEAVE(SUCCESS);
}

int nrt_tensor_memset(tensor *to, uint64_t offset, int value, size_t bytes)
{
    ENTER(0);
    if (!known(to, offset, bytes))
        LEAVE(INVALID);
    memset(to->memory + offset, value, bytes);
    LEAVE(SUCCESS);
}

void *nrt_tensor_get_va(const tensor *which)
{
    return known(which, 0, 0) ? (void *)((uintptr_t)which->memory | DEVICE_BIT) : NULL;
}

static int export(uint64_t address, uint64_t bytes, int *file)
{
    for (tensor *each = tensors; each; each = each->next)
        if (((uintptr_t)each->memory | DEVICE_BIT) == address && bytes <= each->bytes) {
            *file = memfd_create("fake dma-buf", MFD_CLOEXEC);
            return *file >= 0 && ftruncate(*file, bytes) == 0 ? SUCCESS : RESOURCE;
        }
    return INVALID;
}

int nrt_get_dmabuf_fd(uint64_t address, uint64_t bytes, int *file)
{
    ENTER(0);
    LEAVE(export(address, bytes, file));
}

int nrt_get_dmabuf_fd_v2(uint64_t address, uint64_t bytes, int *file, uint64_t *offset)
{
    ENTER(0);
    *offset = 4096;
    LEAVE(export(address, bytes, file));
}
