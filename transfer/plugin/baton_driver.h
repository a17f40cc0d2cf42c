/*
 * Drivers of Baton's transfer out of tree: version 1 of the C ABI.
 *
 * A driver carries KV blocks between processes: one-sided reads and writes of memory that the peer registered, and
 * short messages. A shared object exports one symbol, `baton_driver_v1`, which gives a table of functions. Sessions,
 * grants, digests, deadlines and the choice of paths are Baton's; a driver only moves bytes.
 *
 * `example/baton_cma.c` is a complete driver in about 500 lines; `docs/transfer.md` says how to build and use one.
 *
 * RULES. Memory safety and the fencing of reads rest on them. Baton checks what it can see; after a breach that it
 * sees, the driver is closed and its sessions fall back to other paths.
 *
 *  Lifetime and ownership
 *   1. The table and what it points to are constant and live as long as the process: the object is never unloaded.
 *   2. `open` may be called many times; each call makes a driver of its own, which ends with `close`. Nothing is called
 *      for a driver after its `close`. When `close` returns, the driver touches no memory of Baton's, its descriptors
 *      are closed, its threads have ended, and its operations are over without being reported.
 *   3. Pointers given to a call are the caller's and valid during the call only; keep copies, never the pointers. What
 *      they point to is aligned, and never null unless said so. Nothing is allocated on one side and freed on the other.
 *   4. Handles (of registrations, peers and peers' keys) are numbers of the driver's choice, such as addresses of its
 *      own objects. Baton gives back only handles it got from the same driver, each until the call that ends it:
 *      `deregister`, `disconnect` (which ends the keys imported from that peer, too), `forget`. It never gives a
 *      handle to `deregister` or `forget` while an operation on it is unreported.
 *   5. Registered memory stays in place until `deregister` has returned.
 *
 *  Threads, waiting, failing
 *   6. One thread opens a driver and makes all its calls. Different drivers of one object run on different threads at
 *      the same time: what they share, they lock. A driver's own threads are its own matter; they never call Baton.
 *   7. Nothing waits, but `open`, `connect`, `disconnect` and `close`, each for at most BATON_CALL_MAX_MS. Longest is a copy of
 *      `op_max` bytes.
 *   8. No call raises signals, changes signal handlers or the working directory, writes to standard streams, ends or
 *      forks the process, or lets a C++ exception or a longjmp out.
 *   9. Calls return a `baton_status`. With BATON_FAILED they say why in `error`, for people, NUL-terminated, in UTF-8;
 *      outputs are then ignored and nothing was posted, registered or connected. `error` is zeroed by the caller.
 *
 *  Operations
 *  10. Every operation that was posted (BATON_OK) is reported exactly once by `poll`, with the `op` it was given. An
 *      operation that was not posted is never reported. The end of a peer makes its operations fail; it hangs nothing.
 *  11. When `disconnect` returns, no operation posted to that peer reads or writes memory on this side any more. Those
 *      unreported are over: Baton counts them as failed, and `poll` must not report them.
 *  12. A read that is reported is in local memory. A write that is reported is in the *peer's* memory: delivered, not
 *      sent. A send that is reported needs its buffer no more. A failed operation touches nothing after its report.
 *  13. Reads, writes and sends move all their bytes or fail, and report how many; a receive reports the message's length.
 *      A message longer than the range awaiting it makes the receive fail, and nothing beyond the range is written.
 *  14. Local ranges are within their registration and no longer than `op_max` or `message_max`: Baton checks it. That
 *      the peer's range is within the peer's registration is checked by this driver, the peer's or the network; it
 *      fails with BATON_RANGE or a failed report, whatever offset is asked for.
 *  15. Where the queues are full, posting gives BATON_AGAIN and leaves no trace: Baton polls and tries again.
 *  16. A message lands where the peer awaits its tag. Tags are random and used once. Baton awaits before it asks a peer
 *      to send: a message that nobody awaits may be dropped, and what is kept of such messages must be bounded.
 *
 *  Peers are not trusted
 *  17. Addresses and keys handed to `connect` and `import_key`, and all that comes from the network, are a peer's input:
 *      any bytes give an error at worst. Check lengths before use.
 *  18. A key is a capability: unguessable, where the network does not see to that; it covers its registration and
 *      nothing else. No peer writes the memory once `close` has returned and, with BATON_REVOKES, once `deregister`
 *      has. A peer's read that is late may go on, where the network has no better: it does no harm here.
 */
#ifndef BATON_DRIVER_H
#define BATON_DRIVER_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BATON_ABI_VERSION 1u
#define BATON_CALL_MAX_MS 2000
#define BATON_ADDRESS_MAX 4096 /* bytes of an address */
#define BATON_KEY_MAX 2048     /* bytes of a key */
#define BATON_MESSAGE_LIMIT (1u << 30)

typedef int32_t baton_status;
enum {
    BATON_OK = 0,
    BATON_FAILED = 1, /* of a post: the connection is broken, nothing more can be posted to this peer */
    BATON_AGAIN = 2,  /* of a post: the queues are full */
    BATON_RANGE = 3   /* of a post: the peer's range is not within its registration */
};

/* Opaque: one opened driver. */
typedef struct baton_driver baton_driver;

/* Filled by the driver when a call fails. */
typedef struct baton_error {
    char what[512];   /* what failed, and why */
    char remedy[256]; /* what would help; may stay empty */
} baton_error;

/* What Baton tells a driver that opens. Newer versions append: `size` is how many bytes are there. */
typedef struct baton_open_options {
    uint32_t size;
    uint32_t reserved;
    const char *bind; /* IP address of the interface to use, as text; null: the driver's choice */
} baton_open_options;

enum {
    BATON_SAME_HOST = 1u << 0,   /* the peer must be on this host */
    BATON_CAN_READ = 1u << 1,    /* one-sided reads */
    BATON_CAN_WRITE = 1u << 2,   /* one-sided writes */
    BATON_REVOKES = 1u << 3,     /* no peer writes the memory once `deregister` has returned */
    BATON_TAKES_CUDA = 1u << 4,  /* registers BATON_PLACE_CUDA */
    BATON_TAKES_NEURON = 1u << 5 /* registers BATON_PLACE_NEURON */
};

/* What an opened driver can do; zeroed by the caller. Texts are NUL-terminated. */
typedef struct baton_info {
    uint32_t flags;
    uint32_t rails;       /* network interfaces used side by side, 1 to 64 */
    uint64_t message_max; /* longest message, at most BATON_MESSAGE_LIMIT; 0: there are no messages */
    uint64_t op_max;      /* longest one-sided operation, at least 4096 where there are any */
    uint32_t nap_us;      /* most that Baton may sleep while operations are outstanding; 0: 1000 */
    uint32_t reserved;
    char wire[64];        /* what both ends must have in common, such as "example-cma/1": printable ASCII */
    char detail[256];     /* library, version, devices, for people */
    char no_cuda[128];    /* why CUDA memory is not taken */
    char no_neuron[128];  /* why Neuron memory is not taken */
} baton_info;

enum { BATON_PLACE_HOST = 0, BATON_PLACE_CUDA = 1, BATON_PLACE_NEURON = 2 };

/* Memory to register. */
typedef struct baton_memory {
    uint64_t address; /* in the address space of its kind */
    uint64_t len;     /* bytes, at least 1 */
    uint32_t place;   /* BATON_PLACE_... */
    uint32_t device;  /* number of the device, where it is not the host's */
    int32_t dmabuf;   /* the memory as a dma-buf (duplicate it to keep it); -1: there is none */
    uint32_t reserved;
    uint64_t dmabuf_offset; /* where the memory begins in it */
} baton_memory;

enum { BATON_ACCESS_LOCAL = 0, BATON_ACCESS_REMOTE_READ = 1, BATON_ACCESS_REMOTE_WRITE = 2 };

/* Where a driver puts an address or a key: at most `room` bytes at `bytes`, and their number in `len`. */
typedef struct baton_blob {
    uint8_t *bytes;
    uint64_t room;
    uint64_t len;
} baton_blob;

/* The local end of an operation. */
typedef struct baton_local {
    uint64_t registration; /* handle */
    uint64_t offset;
    uint64_t len; /* bytes, at least 1 */
} baton_local;

/* The peer's end of a one-sided operation. */
typedef struct baton_remote {
    uint64_t peer; /* handle */
    uint64_t key;  /* handle that `import_key` gave */
    uint64_t offset;
} baton_remote;

/* The end of an operation. */
typedef struct baton_done {
    uint64_t op;
    uint64_t bytes;      /* moved, when `status` is BATON_OK */
    baton_status status; /* BATON_OK, or BATON_FAILED with `why` */
    uint32_t reserved;
    char why[104];
} baton_done;

/* The functions of a driver: all must be there. */
typedef struct baton_driver_table {
    uint32_t abi_version; /* BATON_ABI_VERSION */
    uint32_t size;        /* sizeof(baton_driver_table) */

    baton_status (*open)(const baton_open_options *options, baton_driver **driver, baton_error *error);
    void (*close)(baton_driver *driver);
    baton_status (*info)(baton_driver *driver, baton_info *info, baton_error *error);

    /* Where peers reach the driver: opaque to all but a driver of equal `wire`; constant. */
    baton_status (*address)(baton_driver *driver, baton_blob *address, baton_error *error);

    /* Registers memory, and gives a key of at least one byte unless `access` is BATON_ACCESS_LOCAL. */
    baton_status (*register_memory)(baton_driver *driver, const baton_memory *memory, uint32_t access,
                                    uint64_t *registration, baton_blob *key, baton_error *error);
    void (*deregister)(baton_driver *driver, uint64_t registration);

    baton_status (*connect)(baton_driver *driver, const uint8_t *address, uint64_t len, uint64_t *peer,
                            baton_error *error);
    void (*disconnect)(baton_driver *driver, uint64_t peer); /* rule 11 */

    /* Takes a key of a peer's registration. */
    baton_status (*import_key)(baton_driver *driver, uint64_t peer, const uint8_t *key, uint64_t len,
                               uint64_t *imported, baton_error *error);
    void (*forget)(baton_driver *driver, uint64_t peer, uint64_t imported);

    /* Posts: of a peer's memory, to a peer's memory, a message, and the awaiting of one. `op` is never reused. */
    baton_status (*read)(baton_driver *driver, const baton_remote *from, const baton_local *to, uint64_t op,
                         baton_error *error);
    baton_status (*write)(baton_driver *driver, const baton_remote *to, const baton_local *from, uint64_t op,
                          baton_error *error);
    baton_status (*send)(baton_driver *driver, uint64_t peer, uint64_t tag, const baton_local *from, uint64_t op,
                         baton_error *error);
    baton_status (*receive)(baton_driver *driver, uint64_t tag, const baton_local *to, uint64_t op,
                            baton_error *error);

    /* Stops awaiting a message: `poll` then reports the receive, as failed or, where it was too late, as done. */
    void (*cancel_receive)(baton_driver *driver, uint64_t op);

    /*
     * Makes progress, also of what peers do here, and writes at most `room` ends of operations to `done` and their
     * number to `count`. Returns 1 when anything happened, ends or not, else 0. Called again while it returns 1.
     */
    int32_t (*poll)(baton_driver *driver, baton_done *done, uint32_t room, uint32_t *count);

    /* Prepares to sleep until `wait_fd` is readable: 1. There is something to poll for already: 0. */
    int32_t (*arm)(baton_driver *driver);

    /* Readable (as poll(2) says) when there is something to poll for; constant, the driver's own. -1: there is none. */
    int32_t (*wait_fd)(baton_driver *driver);
} baton_driver_table;

/* The one symbol that a driver exports. */
#if defined(__GNUC__)
__attribute__((visibility("default")))
#endif
const baton_driver_table *baton_driver_v1(void);

#ifdef __cplusplus
}
#endif
#endif
