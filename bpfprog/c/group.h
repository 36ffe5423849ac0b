/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * A group's own maps. All of them belong to root: a service's user has no
 * descriptor of any, but for the flow table of a group that it has alone.
 */
#ifndef GRM_GROUP_H
#define GRM_GROUP_H

#include "bpf.h"
#include "control.h"

#define GRM_GROUP_LAYOUT 1 /* grows when anything in this file or in flow.h changes its meaning or place */
#define GRM_APPS 16
#define GRM_SLOT_COUNT(apps) ((apps) * GRM_BANKS * GRM_SLOTS)

enum grm_dissector {
	GRM_FLOW, /* by remote address and port */
	GRM_NOOP, /* every packet is a new flow */
	GRM_CBPF, /* by the cookie that a classic BPF program finds */
};

enum grm_assure {
	GRM_ASSURE_REPLY,    /* the server answered and the client came back */
	GRM_ASSURE_PACKET,   /* a second packet came */
	GRM_ASSURE_EXPLICIT, /* the server said so (UDP_GRM_FLOW_ASSURE) */
};

/* Events of a group; those of a bank are in the service's control map. */
enum grm_counter {
	GRM_DROPPED_CLOSING,   /* new flow while the service stops */
	GRM_DROPPED_NO_SOCKET, /* no bank of the order has a live socket */
	GRM_DEAD_SLOT,         /* a flow's own socket was gone */
	GRM_STALE_FLOW,        /* a flow's bank is not alive any more, so that it was a new flow */
	GRM_TABLE_FULL,        /* new flow not kept: only live assured ones where it belongs */
	GRM_EMBRYO_EVICTED,    /* an embryo gave its place to a new flow */
	GRM_INSERT_RACE,       /* two CPUs had the same new flow; one gave way */
	GRM_TOO_SHORT,         /* the packet's header could not be read, so that it was a new flow */
	GRM_BAD_COOKIE,        /* the dissector found a cookie that names no live socket */
	GRM_CBPF_ERROR,        /* the dissector read past the packet's end */
	GRM_BAD_APP,           /* the dissector named an app that cannot exist */
	GRM_APP_GONE,          /* an app without a service: its new flows went to app 0 */
	GRM_GUARDED,           /* a server's attempt to replace the group's program, or to leave the group */
	GRM_ABI_ERROR,         /* a socket option of ours that was refused */
	GRM_COUNTERS,
};

/* What root knows of one bank of one app. */
struct grm_record {
	__u64 generation; /* 0: none */
	__u64 word;       /* number of sockets | tag << 16; one word, so that both are read at once */
};

#define GRM_WORD_SOCKETS(word) ((__u32)(word) & 0xffff) /* 0: no bank */
#define GRM_WORD_TAG(word) ((__u32)((word) >> 16) & 0x7fff)

/*
 * A home says where a flow lives, in 32 bits: slot 0..7, bank 8..12, app
 * 13..16, tag 17..31. The lower 17 bits are the index into the socket array.
 * The tag counts how often the bank was given to a generation.
 */
#define GRM_HOME(app, bank, slot, tag) \
	((__u32)(slot) | (__u32)(bank) << 8 | (__u32)(app) << 13 | (__u32)(tag) << 17)
#define GRM_HOME_INDEX(home) ((home) & 0x1ffff)
#define GRM_HOME_SLOT(home) ((home) & 0xff)
#define GRM_HOME_BANK(home) ((home) >> 8 & 31)
#define GRM_HOME_APP(home) ((home) >> 13 & 15)
#define GRM_HOME_TAG(home) ((home) >> 17)

/*
 * A cookie is what a server puts into its packets: index << 8 | check << 5 |
 * name. The name stands for an app and a bank (see names); the check is 1..7,
 * so that no cookie is 0, and moves on each time that the name is given away.
 */
#define GRM_NAMES 32
#define GRM_NAME_USED (1u << 31)
#define GRM_NAME(app, bank, serial) (GRM_NAME_USED | (__u32)(serial) << 16 | (__u32)(app) << 8 | (__u32)(bank))
#define GRM_NAME_BANK(name) ((name) & 31)
#define GRM_NAME_APP(name) ((name) >> 8 & 15)
#define GRM_NAME_SERIAL(name) ((name) >> 16 & 0x7fff)
#define GRM_COOKIE_CHECK(serial, index) (1 + ((serial) + (index)) % 7)

/* One element; root maps it. */
struct grm_meta {
	__u32 magic;
	__u32 layout;
	/* What the group is, as it was asked for. */
	__u32 dissector; /* enum grm_dissector */
	__u32 assure;    /* enum grm_assure */
	__u32 max_apps;
	__u32 flows;
	__u64 timeout;   /* ns */
	__u64 seed[2];   /* of the flow table's hash */
	__u8 address[16];
	__u16 port;
	__u8 ipv4;       /* address is IPv4, in the mapped form */
	__u8 tcp;
	__u8 dual_stack;
	__u8 reserved[3];
	__u32 scope;     /* interface of a link-local address */
	__u32 tick;      /* ns that one of the kernel's jiffies is */
	__u64 zero;      /* what jiffies were when the monotonic clock began */
	__u64 epoch[GRM_APPS]; /* of the service that joined as this app; 0: none */
	__u32 names[GRM_NAMES];
	struct grm_record bank[GRM_APPS][GRM_BANKS];
};

/* What the socket-option hooks know of one of the group's sockets. */
struct grm_socket {
	__u64 epoch;
	__u64 generation;
	__u32 bank;
	__u32 index;
	__u32 app;
	__u32 tag;
	__u32 cookie; /* 0: none */
	__u32 reserved;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct grm_meta);
	__uint(map_flags, BPF_F_MMAPABLE);
} meta SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, 1); /* GRM_SLOT_COUNT(max_apps) */
	__uint(key_size, 4);
	__uint(value_size, 8);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, 4);
	__uint(value_size, GRM_COUNTERS * 8);
} counters SEC(".maps");

/* The control map of the group's only service; its size follows from the CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, 4);
	__uint(value_size, GRM_STATS_OFFSET);
	__uint(map_flags, BPF_F_MMAPABLE);
} control SEC(".maps");

/* Or those of its services by app, where there may be several. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, GRM_APPS);
	__uint(key_size, 4);
	__uint(value_size, 4);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_ARRAY);
		__uint(max_entries, 1);
		__uint(key_size, 4);
		__uint(value_size, GRM_STATS_OFFSET);
		__uint(map_flags, BPF_F_MMAPABLE);
	});
} controls SEC(".maps");

/* Set when a program is loaded, so that what a group does not use is not there. */
const volatile __u32 cpus = 1;
const volatile __u32 max_apps = 1;
const volatile __u32 clock_tick = 1;
const volatile __u64 clock_zero = 0;

static __always_inline void count(enum grm_counter which)
{
	__u32 zero = 0;
	__u64 *values = bpf_map_lookup_elem(&counters, &zero);

	if (values)
		values[which]++;
}

/* For programs that may be preempted. */
static __always_inline void count_atomic(enum grm_counter which)
{
	__u32 zero = 0;
	__u64 *values = bpf_map_lookup_elem(&counters, &zero);

	if (values)
		__sync_fetch_and_add(&values[which], 1);
}

static __always_inline struct grm_control *the_control(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline struct grm_control *control_of_app(__u32 app)
{
	__u32 zero = 0;
	void *inner = bpf_map_lookup_elem(&controls, &app);

	return inner ? bpf_map_lookup_elem(inner, &zero) : NULL;
}

static __always_inline struct grm_meta *the_meta(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&meta, &zero);
}

/* This CPU's line of counters of a bank. */
static __always_inline struct grm_stats *stats_of(struct grm_control *c, __u32 bank)
{
	__u64 cpu = bpf_get_smp_processor_id(), line = bank & (GRM_BANKS - 1);

	if (cpu >= cpus)
		cpu = 0;
	/* Linux 6.1 loses the bounds in 32-bit arithmetic, and in copies that were made before the check. */
	barrier_var(cpu);
	barrier_var(line);
	return (void *)c + GRM_STATS_OFFSET + cpu * GRM_BANKS * sizeof(struct grm_stats) + line * sizeof(struct grm_stats);
}

/*
 * The unit of all stamps: 1.07 s of the monotonic clock, counted in jiffies,
 * which the verifier turns into one load, where a call for the coarse clock
 * costs 30 ns. 0 means never; it lasts for the machine's first second.
 */
static __always_inline __u32 stamp(void)
{
	return (bpf_jiffies64() - clock_zero) * clock_tick >> 30;
}

#endif
