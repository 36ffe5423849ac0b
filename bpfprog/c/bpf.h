/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * What our programs need of the kernel's user API, and nothing else: types,
 * contexts and helpers by number. All of it is stable since Linux 5.18; the
 * floor is 6.1. No CO-RE, no kfuncs, so loading never parses the kernel's BTF.
 */
#ifndef GRM_BPF_H
#define GRM_BPF_H

typedef signed int __s32;
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef _Bool bool;

#define NULL ((void *)0)
#define true 1
#define false 0
#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))
#define __noinline __attribute__((noinline))
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define __array(name, val) typeof(val) *name[]
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* One load or store, neither repeated nor split nor left out. */
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))
/* Here the compiler must have x in a register: what was checked of it is what is used. */
#define barrier_var(x) asm volatile("" : "+r"(x))
#define cmpxchg(p, old, new) __sync_val_compare_and_swap(p, old, new)
#define xchg(p, v) __sync_lock_test_and_set(p, v)

#define bpf_htons(x) __builtin_bswap16(x)
#define bpf_ntohs(x) __builtin_bswap16(x)
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines"
#endif

enum {
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
	BPF_MAP_TYPE_REUSEPORT_SOCKARRAY = 20,
	BPF_MAP_TYPE_SK_STORAGE = 24,
};

enum {
	BPF_F_NO_PREALLOC = 1 << 0,
	BPF_F_MMAPABLE = 1 << 10,
	BPF_HDR_START_NET = 1,
	SK_DROP = 0,
	SK_PASS = 1,
};

enum {
	AF_INET = 2,
	AF_INET6 = 10,
	ETH_P_IPV6 = 0x86dd,
	IPPROTO_UDP = 17,
	SOL_SOCKET = 1,
	SO_REUSEPORT = 15,
	SO_BINDTODEVICE = 25,
	SO_ATTACH_REUSEPORT_CBPF = 51,
	SO_ATTACH_REUSEPORT_EBPF = 52,
	SO_BINDTOIFINDEX = 62,
	SO_DETACH_REUSEPORT_BPF = 68,
	NO_INTERFACE = 0x7fffffff,
};

enum {
	EPERM = 1,
	ENOENT = 2,
	EBADF = 9,
	EAGAIN = 11,
	EEXIST = 17,
	EINVAL = 22,
	ENOSPC = 28,
	EOVERFLOW = 75,
	EOPNOTSUPP = 95,
};

#define __md_ptr(type, name) \
	union { type name; __u64 : 64; } __attribute__((aligned(8)))

struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;
	__u32 src_ip6[4];
	__u32 src_port; /* host order */
	__u16 dst_port;
	__u16 : 16;
	__u32 dst_ip4;
	__u32 dst_ip6[4];
	__u32 state;
	__s32 rx_queue_mapping;
};

struct sk_reuseport_md {
	__md_ptr(void *, data); /* the UDP or TCP header */
	__md_ptr(void *, data_end);
	__u32 len;
	__u32 eth_protocol; /* network order */
	__u32 ip_protocol;
	__u32 bind_inany;
	__u32 hash; /* of the four-tuple, with a secret of the kernel's */
	__md_ptr(struct bpf_sock *, sk);
	__md_ptr(struct bpf_sock *, migrating_sk);
};

struct bpf_sock_addr {
	__u32 user_family;
	__u32 user_ip4;
	__u32 user_ip6[4];
	__u32 user_port; /* network order */
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	__md_ptr(struct bpf_sock *, sk);
};

struct bpf_sockopt {
	__md_ptr(struct bpf_sock *, sk);
	__md_ptr(void *, optval);
	__md_ptr(void *, optval_end);
	__s32 level;
	__s32 optname;
	__s32 optlen;
	__s32 retval;
};

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static __u32 (*const bpf_get_prandom_u32)(void) = (void *)7;
static __u32 (*const bpf_get_smp_processor_id)(void) = (void *)8;
static __u64 (*const bpf_get_current_uid_gid)(void) = (void *)15;
static long (*const bpf_get_current_comm)(void *buf, __u32 size) = (void *)16;
static long (*const bpf_skb_load_bytes)(const void *skb, __u32 off, void *to, __u32 len) = (void *)26;
static long (*const bpf_skb_load_bytes_relative)(const void *skb, __u32 off, void *to, __u32 len,
						 __u32 start) = (void *)68;
static long (*const bpf_sk_select_reuseport)(struct sk_reuseport_md *md, void *map, void *key,
					     __u64 flags) = (void *)82;
static void *(*const bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107;
static __u64 (*const bpf_jiffies64)(void) = (void *)118;
static __u64 (*const bpf_get_netns_cookie)(void *ctx) = (void *)122;
static long (*const bpf_loop)(__u32 times, void *step, void *context, __u64 flags) = (void *)181;
static int (*const bpf_set_retval)(int retval) = (void *)187;

#endif
