/*
 * An example of a driver for Baton, complete but small: processes of one user on one Linux host.
 *
 *     cc -O2 -Wall -Wextra -shared -fPIC -o libbaton_cma.so baton_cma.c
 *
 * Reads copy straight out of the peer's memory (process_vm_readv), with the secret of the peer's registration as the last
 * bytes copied: when it is still the key's, the memory was registered all the while. Writes ask the peer to copy out of
 * ours, so that nobody ever writes into another process. Requests and messages are datagrams between Unix sockets.
 */
#define _GNU_SOURCE
#include "../baton_driver.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define MESSAGE_MAX (64u << 10)
#define OP_MAX (1u << 20)   /* a copy of this size takes about 0.1 ms: nothing may block longer (rule 7) */
#define OPERATIONS_MAX 1024 /* posted and unreported */
#define ANSWERS_MAX 4096    /* that found the peer's queue full */
#define PACKETS_PER_POLL 64
#define MAGIC 0x314d43416e6f7442ull

struct secret { uint8_t bytes[16]; };

/* What peers get: both are only ever read on the host where they were made. */
struct address { uint64_t magic; int64_t pid; struct secret name; };
struct key { uint64_t magic, address, len, secret_at; struct secret secret; };

enum { MESSAGE = 1, WRITE = 2, WRITTEN = 3 };

struct packet {
    uint32_t kind;
    int32_t errnum;     /* WRITTEN: 0, or why not */
    uint64_t tag;       /* MESSAGE: of the host; WRITE and WRITTEN: the writer's operation */
    uint64_t from, len; /* WRITE: the writer's memory */
    uint64_t to;        /* WRITE: offset in the registration */
    struct key key;     /* WRITE: the registration */
};

struct registration { struct registration *next; uint8_t *base; uint64_t len; uint32_t access; struct secret secret; };
struct import { struct import *next; struct key key; };
struct peer {
    struct peer *next;
    struct import *imports;
    struct sockaddr_un at;
    pid_t pid;
    int pidfd, dead;
};
struct op {
    struct op *next;
    struct peer *peer; /* null: a receive */
    uint64_t id, tag;
    uint8_t *base;
    uint64_t len;
    int errnum;
};
struct answer { struct answer *next; struct sockaddr_un to; struct packet packet; };

struct baton_driver {
    struct registration *registrations;
    struct peer *peers;
    struct op *writes, *receives, *done; /* what is posted, and what `poll` will report */
    struct answer *answers;
    unsigned operations, answer_count;
    int socket, events, timer;
    struct address address;
};

__attribute__((format(printf, 3, 4)))
static baton_status fail(baton_error *error, const char *remedy, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->what, sizeof error->what, format, arguments);
    va_end(arguments);
    snprintf(error->remedy, sizeof error->remedy, "%s", remedy);
    return BATON_FAILED;
}

static const socklen_t NAME_LEN = offsetof(struct sockaddr_un, sun_path) + 1 + 10 + 32;

static struct sockaddr_un name_of(const struct secret *name) {
    struct sockaddr_un at = {.sun_family = AF_UNIX}; /* sun_path[0] stays 0: an abstract name leaves nothing on disk */
    memcpy(at.sun_path + 1, "baton-cma-", 10);
    for (int i = 0; i < 16; i++) snprintf(at.sun_path + 11 + 2 * i, 3, "%02x", name->bytes[i]);
    return at;
}

static int new_secret(struct secret *secret) {
    return getrandom(secret, sizeof *secret, 0) == (ssize_t)sizeof *secret ? 0 : -1;
}

/* ---- operations ---- */

static struct op *op_new(baton_driver *driver, uint64_t id, struct peer *peer, const baton_local *local) {
    struct op *op = driver->operations < OPERATIONS_MAX ? calloc(1, sizeof *op) : NULL;
    if (!op) return NULL;
    driver->operations++;
    op->id = id;
    op->peer = peer;
    op->base = ((struct registration *)(uintptr_t)local->registration)->base + local->offset;
    op->len = local->len;
    return op;
}

static void op_free(baton_driver *driver, struct op *op) {
    driver->operations--;
    free(op);
}

static void op_done(baton_driver *driver, struct op *op, uint64_t bytes, int errnum) {
    op->len = bytes;
    op->errnum = errnum;
    op->next = driver->done;
    driver->done = op;
}

/* Takes the first operation of a list that is `peer`'s, or that has this id or this tag, out of it. */
static struct op *op_take(struct op **list, const struct peer *peer, const uint64_t *id, const uint64_t *tag) {
    for (struct op *op; (op = *list); list = &op->next) {
        if ((!peer || op->peer == peer) && (!id || op->id == *id) && (!tag || op->tag == *tag)) {
            *list = op->next;
            return op;
        }
    }
    return NULL;
}

static void peer_died(baton_driver *driver, struct peer *peer) {
    struct op *op;
    if (!peer->dead) epoll_ctl(driver->events, EPOLL_CTL_DEL, peer->pidfd, NULL);
    peer->dead = 1;
    while ((op = op_take(&driver->writes, peer, NULL, NULL))) op_done(driver, op, 0, ECONNRESET);
}

/* Copies `len` bytes of another process, and after them the secret that vouches for them. */
static int copy_in(pid_t pid, uint64_t from, uint8_t *to, uint64_t len, uint64_t secret_at, struct secret *secret) {
    struct iovec local[2] = {{to, len}, {secret, sizeof *secret}};
    struct iovec remote[2] = {{(void *)(uintptr_t)from, len}, {(void *)(uintptr_t)secret_at, sizeof *secret}};
    unsigned long count = secret ? 2 : 1;
    ssize_t want = (ssize_t)(len + (secret ? sizeof *secret : 0));
    ssize_t got = process_vm_readv(pid, local, count, remote, count, 0);
    return got == want ? 0 : got < 0 ? errno : EFAULT;
}

static int send_packet(baton_driver *driver, const struct sockaddr_un *to, const struct packet *packet, void *payload,
                       uint64_t len) {
    struct iovec parts[2] = {{(void *)packet, sizeof *packet}, {payload, len}};
    struct msghdr message = {.msg_name = (void *)to, .msg_namelen = NAME_LEN, .msg_iov = parts, .msg_iovlen = 2};
    return sendmsg(driver->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? errno : 0;
}

/* ---- opening and closing ---- */

static void cma_close(baton_driver *driver) {
    for (struct registration *r = driver->registrations, *next; r; r = next) {
        next = r->next;
        explicit_bzero(r, sizeof *r);
        free(r);
    }
    for (struct peer *p = driver->peers, *next; p; p = next) {
        next = p->next;
        for (struct import *i = p->imports, *n; i; i = n) n = i->next, free(i);
        close(p->pidfd);
        free(p);
    }
    struct op *lists[] = {driver->writes, driver->receives, driver->done};
    for (int i = 0; i < 3; i++)
        for (struct op *op = lists[i], *next; op; op = next) next = op->next, free(op);
    for (struct answer *a = driver->answers, *next; a; a = next) next = a->next, free(a);
    if (driver->socket >= 0) close(driver->socket);
    if (driver->timer >= 0) close(driver->timer);
    if (driver->events >= 0) close(driver->events);
    free(driver);
}

static baton_status cma_open(const baton_open_options *options, baton_driver **out, baton_error *error) {
    (void)options; /* there is no network interface to bind to */
    baton_driver *driver = calloc(1, sizeof *driver);
    if (!driver) return fail(error, "", "out of memory");
    driver->socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    driver->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    driver->events = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event on_socket = {.events = EPOLLIN, .data.ptr = NULL};
    struct epoll_event on_timer = {.events = EPOLLIN, .data.ptr = driver};
    int on = 1, buffer = 4 << 20;
    driver->address = (struct address){.magic = MAGIC, .pid = getpid()};
    if (driver->socket < 0 || driver->timer < 0 || driver->events < 0 || new_secret(&driver->address.name) ||
        setsockopt(driver->socket, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) ||
        epoll_ctl(driver->events, EPOLL_CTL_ADD, driver->socket, &on_socket) ||
        epoll_ctl(driver->events, EPOLL_CTL_ADD, driver->timer, &on_timer))
        goto failed;
    setsockopt(driver->socket, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer); /* as much as the system allows */
    struct sockaddr_un at = name_of(&driver->address.name);
    if (bind(driver->socket, (struct sockaddr *)&at, NAME_LEN)) goto failed;
    *out = driver;
    return BATON_OK;
failed:
    fail(error, "", "cannot set up a Unix socket: %s", strerror(errno));
    cma_close(driver);
    return BATON_FAILED;
}

static baton_status cma_info(baton_driver *driver, baton_info *info, baton_error *error) {
    (void)driver, (void)error;
    info->flags = BATON_SAME_HOST | BATON_CAN_READ | BATON_CAN_WRITE | BATON_REVOKES;
    info->rails = 1;
    info->message_max = MESSAGE_MAX;
    info->op_max = OP_MAX;
    snprintf(info->wire, sizeof info->wire, "example-cma/1");
    snprintf(info->detail, sizeof info->detail, "example driver: process_vm_readv and Unix datagrams");
    snprintf(info->no_cuda, sizeof info->no_cuda, "the kernel copies host memory only");
    snprintf(info->no_neuron, sizeof info->no_neuron, "the kernel copies host memory only");
    return BATON_OK;
}

static baton_status put(baton_blob *blob, const void *bytes, size_t len, baton_error *error) {
    if (blob->room < len) return fail(error, "", "%zu bytes have no room in %llu", len, (unsigned long long)blob->room);
    memcpy(blob->bytes, bytes, len);
    blob->len = len;
    return BATON_OK;
}

static baton_status cma_address(baton_driver *driver, baton_blob *address, baton_error *error) {
    return put(address, &driver->address, sizeof driver->address, error);
}

/* ---- memory and peers ---- */

static baton_status cma_register(baton_driver *driver, const baton_memory *memory, uint32_t access, uint64_t *handle,
                                 baton_blob *blob, baton_error *error) {
    if (memory->place != BATON_PLACE_HOST) return fail(error, "", "only host memory can be registered");
    struct registration *r = calloc(1, sizeof *r);
    if (!r || new_secret(&r->secret)) {
        free(r);
        return fail(error, "", "out of memory");
    }
    r->base = (uint8_t *)(uintptr_t)memory->address;
    r->len = memory->len;
    r->access = access;
    struct key key = {MAGIC, memory->address, memory->len, (uintptr_t)&r->secret, r->secret};
    if (access != BATON_ACCESS_LOCAL && put(blob, &key, sizeof key, error) != BATON_OK) {
        free(r);
        return BATON_FAILED;
    }
    r->next = driver->registrations;
    driver->registrations = r;
    *handle = (uintptr_t)r;
    return BATON_OK;
}

static void cma_deregister(baton_driver *driver, uint64_t handle) {
    struct registration *r = (struct registration *)(uintptr_t)handle, **at = &driver->registrations;
    while (*at != r) at = &(*at)->next;
    *at = r->next;
    explicit_bzero(r, sizeof *r); /* a reader that looks for the secret no longer finds it */
    free(r);
}

static baton_status cma_connect(baton_driver *driver, const uint8_t *bytes, uint64_t len, uint64_t *handle,
                                baton_error *error) {
    struct address address;
    if (len != sizeof address) return fail(error, "", "an address of %llu bytes", (unsigned long long)len);
    memcpy(&address, bytes, sizeof address);
    if (address.magic != MAGIC || address.pid <= 0 || address.pid > INT32_MAX)
        return fail(error, "", "not an address of this driver");
    struct peer *peer = calloc(1, sizeof *peer);
    if (!peer) return fail(error, "", "out of memory");
    peer->pid = (pid_t)address.pid;
    peer->at = name_of(&address.name);
    /* Readable once the process has ended: the sign of life. */
    peer->pidfd = (int)syscall(SYS_pidfd_open, peer->pid, 0);
    struct epoll_event on_exit = {.events = EPOLLIN, .data.ptr = peer};
    /* A packet of a kind that means nothing: is there a socket of that name? */
    struct packet hello = {0};
    int reached = peer->pidfd < 0 ? errno : send_packet(driver, &peer->at, &hello, NULL, 0);
    if ((reached && reached != EAGAIN) || epoll_ctl(driver->events, EPOLL_CTL_ADD, peer->pidfd, &on_exit)) {
        fail(error, "both processes must share a host, a PID and a network namespace",
             "process %d is not reached: %s", (int)peer->pid, strerror(reached ? reached : errno));
        if (peer->pidfd >= 0) close(peer->pidfd);
        free(peer);
        return BATON_FAILED;
    }
    peer->next = driver->peers;
    driver->peers = peer;
    *handle = (uintptr_t)peer;
    return BATON_OK;
}

static void cma_disconnect(baton_driver *driver, uint64_t handle) {
    struct peer *peer = (struct peer *)(uintptr_t)handle, **at = &driver->peers;
    struct op *op;
    while (*at != peer) at = &(*at)->next;
    *at = peer->next;
    peer_died(driver, peer);
    while ((op = op_take(&driver->done, peer, NULL, NULL))) op_free(driver, op); /* over: not to be reported */
    for (struct import *i = peer->imports, *next; i; i = next) next = i->next, free(i);
    close(peer->pidfd);
    free(peer);
}

static baton_status cma_import(baton_driver *driver, uint64_t handle, const uint8_t *bytes, uint64_t len,
                               uint64_t *imported, baton_error *error) {
    (void)driver;
    struct peer *peer = (struct peer *)(uintptr_t)handle;
    struct import *import = calloc(1, sizeof *import);
    if (import && len == sizeof import->key) memcpy(&import->key, bytes, sizeof import->key);
    if (!import || import->key.magic != MAGIC || import->key.len > UINT64_MAX - import->key.address) {
        free(import);
        return fail(error, "", "not a key of this driver");
    }
    import->next = peer->imports;
    peer->imports = import;
    *imported = (uintptr_t)import;
    return BATON_OK;
}

static void cma_forget(baton_driver *driver, uint64_t peer, uint64_t imported) {
    (void)driver;
    struct import *import = (struct import *)(uintptr_t)imported;
    struct import **at = &((struct peer *)(uintptr_t)peer)->imports;
    while (*at != import) at = &(*at)->next;
    *at = import->next;
    free(import);
}

/* ---- posting ---- */

static int outside(const struct key *key, uint64_t offset, uint64_t len) {
    return offset > key->len || len > key->len - offset;
}

static baton_status cma_read(baton_driver *driver, const baton_remote *from, const baton_local *to, uint64_t id,
                             baton_error *error) {
    struct peer *peer = (struct peer *)(uintptr_t)from->peer;
    const struct key *key = &((struct import *)(uintptr_t)from->key)->key;
    if (peer->dead) return fail(error, "", "the peer has gone");
    if (outside(key, from->offset, to->len)) return BATON_RANGE;
    struct op *op = op_new(driver, id, peer, to);
    if (!op) return BATON_AGAIN;
    struct secret secret;
    int errnum = copy_in(peer->pid, key->address + from->offset, op->base, to->len, key->secret_at, &secret);
    if (!errnum && memcmp(&secret, &key->secret, sizeof secret)) errnum = EKEYREVOKED;
    op_done(driver, op, to->len, errnum);
    return BATON_OK;
}

static baton_status sent(baton_driver *driver, struct peer *peer, struct op *op, int errnum, baton_error *error) {
    if (!errnum) return BATON_OK;
    op_free(driver, op);
    if (errnum == EAGAIN || errnum == ENOBUFS || errnum == ENOMEM) return BATON_AGAIN; /* the peer's queue is full */
    peer_died(driver, peer);
    return fail(error, "", "the peer is not reached: %s", strerror(errnum));
}

static baton_status cma_write(baton_driver *driver, const baton_remote *to, const baton_local *from, uint64_t id,
                              baton_error *error) {
    struct peer *peer = (struct peer *)(uintptr_t)to->peer;
    const struct key *key = &((struct import *)(uintptr_t)to->key)->key;
    if (peer->dead) return fail(error, "", "the peer has gone");
    if (outside(key, to->offset, from->len)) return BATON_RANGE;
    struct op *op = op_new(driver, id, peer, from);
    if (!op) return BATON_AGAIN;
    struct packet ask = {.kind = WRITE, .tag = id, .from = (uintptr_t)op->base, .len = op->len, .to = to->offset};
    ask.key = *key;
    baton_status status = sent(driver, peer, op, send_packet(driver, &peer->at, &ask, NULL, 0), error);
    if (status == BATON_OK) op->next = driver->writes, driver->writes = op;
    return status;
}

static baton_status cma_send(baton_driver *driver, uint64_t handle, uint64_t tag, const baton_local *from, uint64_t id,
                             baton_error *error) {
    struct peer *peer = (struct peer *)(uintptr_t)handle;
    if (peer->dead) return fail(error, "", "the peer has gone");
    struct op *op = op_new(driver, id, peer, from);
    if (!op) return BATON_AGAIN;
    struct packet head = {.kind = MESSAGE, .tag = tag};
    baton_status status = sent(driver, peer, op, send_packet(driver, &peer->at, &head, op->base, op->len), error);
    if (status == BATON_OK) op_done(driver, op, op->len, 0); /* the socket has a copy */
    return status;
}

static baton_status cma_receive(baton_driver *driver, uint64_t tag, const baton_local *to, uint64_t id,
                                baton_error *error) {
    (void)error;
    struct op *op = op_new(driver, id, NULL, to);
    if (!op) return BATON_AGAIN;
    op->tag = tag;
    op->next = driver->receives;
    driver->receives = op;
    return BATON_OK;
}

static void cma_cancel(baton_driver *driver, uint64_t id) {
    struct op *op = op_take(&driver->receives, NULL, &id, NULL);
    if (op) op_done(driver, op, 0, ECANCELED);
}

/* ---- what peers send ---- */

static void answer(baton_driver *driver, const struct sockaddr_un *to, const struct packet *packet) {
    if (send_packet(driver, to, packet, NULL, 0) != EAGAIN || driver->answer_count == ANSWERS_MAX) return;
    struct answer *late = calloc(1, sizeof *late); /* tried again in 1 ms; without, the writer's deadline ends its write */
    if (!late) return;
    *late = (struct answer){driver->answers, *to, *packet};
    driver->answers = late;
    driver->answer_count++;
    struct itimerspec in_1_ms = {.it_value.tv_nsec = 1000000};
    timerfd_settime(driver->timer, 0, &in_1_ms, NULL);
}

static void answer_again(baton_driver *driver) {
    uint64_t expirations;
    (void)!read(driver->timer, &expirations, sizeof expirations);
    struct answer *late = driver->answers;
    driver->answers = NULL;
    driver->answer_count = 0;
    for (struct answer *next; late; late = next) {
        next = late->next;
        answer(driver, &late->to, &late->packet);
        free(late);
    }
}

static void serve_write(baton_driver *driver, pid_t writer, const struct sockaddr_un *from, const struct packet *ask) {
    struct packet written = {.kind = WRITTEN, .tag = ask->tag, .errnum = EACCES};
    for (struct registration *r = driver->registrations; r; r = r->next) {
        if ((uintptr_t)&r->secret != ask->key.secret_at || memcmp(&r->secret, &ask->key.secret, sizeof r->secret)) continue;
        if (r->access != BATON_ACCESS_REMOTE_WRITE || ask->to > r->len || ask->len > r->len - ask->to || ask->len > OP_MAX)
            break;
        written.errnum = copy_in(writer, ask->from, r->base + ask->to, ask->len, 0, NULL);
    }
    answer(driver, from, &written);
}

static struct peer *sender(baton_driver *driver, const struct sockaddr_un *from) {
    struct peer *peer = driver->peers;
    while (peer && memcmp(&peer->at, from, NAME_LEN)) peer = peer->next;
    return peer;
}

/* Takes one datagram; 0: there is none. */
static int take_packet(baton_driver *driver) {
    struct packet packet = {0};
    struct sockaddr_un from = {0};
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(struct ucred))]; } control;
    struct iovec parts[2] = {{&packet, sizeof packet}, {NULL, 0}};
    struct msghdr message = {&from, sizeof from, parts, 1, &control, sizeof control, 0};
    ssize_t len = recvmsg(driver->socket, &message, MSG_DONTWAIT | MSG_PEEK | MSG_TRUNC);
    if (len < 0) return 0;
    struct ucred who = {.uid = (uid_t)-1};
    struct cmsghdr *credentials = CMSG_FIRSTHDR(&message);
    if (credentials && credentials->cmsg_type == SCM_CREDENTIALS) memcpy(&who, CMSG_DATA(credentials), sizeof who);
    int whole = len >= (ssize_t)sizeof packet && who.uid == geteuid();
    uint64_t payload = (uint64_t)len - (whole ? sizeof packet : 0);
    struct op *receive = NULL;
    if (whole && packet.kind == MESSAGE) receive = op_take(&driver->receives, NULL, NULL, &packet.tag);
    int fits = receive && payload <= receive->len;
    if (fits) parts[1] = (struct iovec){receive->base, payload};
    message.msg_iovlen = fits ? 2 : 1;
    message.msg_control = NULL, message.msg_controllen = 0;
    (void)!recvmsg(driver->socket, &message, MSG_DONTWAIT); /* straight to its place, or away with it */
    if (receive) op_done(driver, receive, payload, fits ? 0 : EMSGSIZE);
    if (whole && packet.kind == WRITE) serve_write(driver, who.pid, &from, &packet);
    struct peer *peer = whole && packet.kind == WRITTEN ? sender(driver, &from) : NULL;
    if (peer) {
        struct op *write = op_take(&driver->writes, peer, &packet.tag, NULL);
        if (write) op_done(driver, write, write->len, packet.errnum);
    }
    return 1;
}

static int32_t cma_poll(baton_driver *driver, baton_done *done, uint32_t room, uint32_t *count) {
    struct epoll_event events[16];
    int ready = epoll_wait(driver->events, events, 16, 0), happened = ready > 0;
    for (int i = 0; i < ready; i++) {
        if (events[i].data.ptr == driver) answer_again(driver);
        else if (events[i].data.ptr) peer_died(driver, events[i].data.ptr);
        else for (int n = 0; n < PACKETS_PER_POLL && take_packet(driver); n++) {}
    }
    for (*count = 0; *count < room && driver->done; happened = 1) {
        struct op *op = driver->done;
        driver->done = op->next;
        baton_done *end = &done[(*count)++];
        *end = (baton_done){.op = op->id, .bytes = op->len};
        if (op->errnum) {
            end->status = BATON_FAILED;
            snprintf(end->why, sizeof end->why, "%s", strerror(op->errnum));
        }
        op_free(driver, op);
    }
    return happened;
}

static int32_t cma_arm(baton_driver *driver) {
    struct epoll_event event;
    return !driver->done && epoll_wait(driver->events, &event, 1, 0) == 0;
}

static int32_t cma_wait_fd(baton_driver *driver) { return driver->events; }

const baton_driver_table *baton_driver_v1(void) {
    static const baton_driver_table table = {
        BATON_ABI_VERSION, sizeof table, cma_open,   cma_close,   cma_info,   cma_address, cma_register,
        cma_deregister,    cma_connect,  cma_disconnect, cma_import, cma_forget, cma_read, cma_write,
        cma_send,          cma_receive,  cma_cancel, cma_poll,    cma_arm,    cma_wait_fd,
    };
    return &table;
}
