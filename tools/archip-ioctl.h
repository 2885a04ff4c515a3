/*
 * What ioctl(2) can ask of a volume on an archipfs mount. C and C++.
 *
 * While these are carried out, the kernel holds no lock of the file's: reads and writes of the volume go on. That makes
 * ARCHIP_IOC_SNAPSHOT the way to take a snapshot of a disk that is in use; setting the extended attribute
 * user.archip.snapshot does the same, but holds up its writes meanwhile.
 *
 *     #include "archip-ioctl.h"
 *
 *     struct archip_name monday = {.name = "vm1-monday"};
 *     int volume = open("/mnt/archip/vm1", O_RDONLY);
 *     if (volume < 0 || ioctl(volume, ARCHIP_IOC_SNAPSHOT, &monday) < 0)
 *         perror("vm1");                  // the sentence to the errno is in the daemon's log
 *
 * Any descriptor of the volume will do, however it was opened; what counts is who calls:
 *
 *     ARCHIP_IOC_SNAPSHOT   needs write permission for the volume's file (its mode, owner and group)
 *     ARCHIP_IOC_CLONE      needs read permission, and write permission or to own the file
 *     ARCHIP_IOC_INFO       needs the descriptor
 *
 * errno: ENOTTY   not a volume, or a mount without the native front (-o front=off)
 *        EACCES   no permission
 *        EINVAL   the name is empty, not ended by a NUL, not UTF-8, has a '/' or begins with a dot; or what is reserved
 *                 is not zero
 *        EEXIST   the name is taken
 *        EBUSY    another node has the volume's lock
 *        ENOENT   the volume has been removed
 *        ENOSPC   the store is full
 */
#ifndef ARCHIP_IOCTL_H
#define ARCHIP_IOCTL_H

#include <linux/ioctl.h>
#include <stdint.h>

#define ARCHIP_NAME_BYTES 256

struct archip_name {
    char name[ARCHIP_NAME_BYTES]; /* of what is to be made: 1 to 255 bytes of UTF-8 and a NUL */
    uint64_t reserved[4];         /* zero */
};

enum archip_kind {
    ARCHIP_KIND_VOLUME = 1,
    ARCHIP_KIND_SNAPSHOT = 2,
    ARCHIP_KIND_CLONE = 3,
};

/* Bits of archip_info.flags. */
#define ARCHIP_INFO_OPEN 0x1u     /* a node has it open and may write it */
#define ARCHIP_INFO_KEPT 0x2u     /* held open by `archip volume-open` */
#define ARCHIP_INFO_LOCKED 0x4u   /* locked by `archip volume-lock` */
#define ARCHIP_INFO_FOREIGN 0x8u  /* whose lock it is for these reasons is another node */
#define ARCHIP_INFO_REMOVED 0x10u /* it has no name any more, and goes with its last descriptor */

struct archip_info {
    uint32_t format; /* version of the on-disk format */
    uint32_t kind;   /* enum archip_kind */
    uint64_t flags;
    uint64_t size_bytes;
    uint64_t stored_bytes;        /* in its own layer: what was written since its last snapshot */
    uint8_t id[16];               /* as `uuid` in `archip volume-info` */
    uint8_t origin[16];           /* id of the volume it was made from; zeros: none */
    char name[ARCHIP_NAME_BYTES]; /* ended by a NUL; empty once it is removed */
    uint64_t reserved[8];         /* zero */
};

/* A snapshot of the volume, or a second name for what a snapshot holds. It belongs to the volume's owner. */
#define ARCHIP_IOC_SNAPSHOT _IOW(0xA8, 1, struct archip_name)
/* A writable volume that begins as a copy of the volume or snapshot. It belongs to the caller, mode 0600. */
#define ARCHIP_IOC_CLONE _IOW(0xA8, 2, struct archip_name)
#define ARCHIP_IOC_INFO _IOR(0xA8, 3, struct archip_info)

#endif
