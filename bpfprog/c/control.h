/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * The control map of one service: an ARRAY of one element with BPF_F_MMAPABLE.
 * The programs of all the service's groups read it, user space writes it
 * through mmap(2) (package control is its twin in Go). The service's own user
 * can write every word: nothing here is used as an index before it is bounded.
 */
#ifndef GRM_CONTROL_H
#define GRM_CONTROL_H

#define GRM_MAGIC 0x314d5247 /* "GRM1" */
#define GRM_LAYOUT 1
#define GRM_BANKS 32        /* generations alive at once */
#define GRM_SLOTS 256       /* sockets of one generation in one group */
#define GRM_FALLBACK 12     /* banks that one order word can name */
#define GRM_STATS_OFFSET 4096

/* What a bank's generation is up to; "working", "watched" follow from order and watch_until. */
enum grm_bank_state {
	GRM_FREE,     /* no generation */
	GRM_PREPARED, /* sockets are bound and stored, no server has been ready yet */
	GRM_SERVING,  /* its server said that it is ready */
	GRM_DRAINING, /* told to end */
	GRM_ENDED,    /* its server is gone and does not come back */
};

/* What number the socket options show for a bank's generation. */
enum grm_naming {
	GRM_BY_GENERATION, /* its lower 32 bits */
	GRM_BY_SERVER,     /* the server chose one */
	GRM_PARKED,        /* none yet: the server is to choose one */
};

struct grm_bank {
	__u64 generation;  /* 0: none */
	__u32 state;       /* enum grm_bank_state */
	__u32 keeper;      /* pid, as the service's pid namespace counts; advisory */
	__u32 server;      /* pid; advisory */
	__u32 name;        /* what servers call the generation (UDP_GRM_SOCKET_GEN), if naming is GRM_BY_SERVER */
	__u64 ready_at;    /* CLOCK_BOOTTIME, ns; 0: not yet */
	__u64 watch_until; /* CLOCK_BOOTTIME, ns */
	__u64 drain_until; /* CLOCK_BOOTTIME, ns; 0: not draining */
	__u32 naming;      /* enum grm_naming */
	__u32 reserved;
	__u64 spare;
};

struct grm_control {
	__u32 magic;
	__u32 layout;
	__u64 epoch;   /* random, made with the map: (epoch, generation) never comes again */
	__u64 order;   /* bits 0..3: count n; then n banks of 5 bits, newest first. The flip is one store. */
	__u32 alive;   /* bit b: flows of bank b are served by it; else they are new flows */
	__u32 closing; /* not 0: no new flow is taken */
	__u32 request; /* user space only: what ExecStop was told */
	__u32 plan;    /* user space only: what ExecStartPre decided */
	__u64 spare[3];
	struct grm_bank bank[GRM_BANKS];
	/* behind the banks, up to GRM_STATS_OFFSET: user space's own */
};

/* One line per CPU and bank at GRM_STATS_OFFSET, index cpu * GRM_BANKS + bank. */
struct grm_stats {
	__u64 packets;       /* given to a socket of this bank */
	__u64 new_flows;     /* of them: of no known flow */
	__u64 assured;       /* flows that became assured */
	__u64 other_slot;    /* given to another socket than the flow's or the hash's: that one was dead */
	__u64 fell_back;     /* new flows given to this bank because newer ones had no live socket */
	__u64 spare;
	__u32 last_packet;   /* coarse monotonic clock >> 30 (units of 1.07 s) */
	__u32 last_assured;  /* the same, of an assured flow's packet */
	__u64 spare2;
};

#endif
