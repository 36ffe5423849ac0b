// Package bpfprog is the kernel side of grm: the programs that steer the
// packets of a reuseport group, the hooks on a service's cgroup, their maps,
// and the pins that keep all of it while nobody runs. It is the only package
// that imports cilium/ebpf.
//
// A group is one reuseport group of the kernel. Its maps (c/group.h) are root's
// alone, but for the flow table, which its service maps to count flows. A
// service has one control map (package control), which the programs of all its groups read,
// and which its own user may write.
//
//	/sys/fs/bpf/grm/<netns cookie>/groups/<protocol>-<address>-<port>/
//	    meta slots counters [flows] sockets [filter] [control] [controls] program-<build>
//	/sys/fs/bpf/grm/<netns cookie>/services/<name>/
//	    control programs/<group>-<hook>-<build> hooks/<cgroup id>/<group>-<hook>
//
// A program's pin carries in its name a hash of everything that went into it,
// so that the right one is found without asking the verifier, and another one
// is known to be of another build.
//
// The process needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or CAP_SYS_ADMIN),
// and CAP_SYS_ADMIN to mount bpffs. Callers serialise what they do to one
// service; what several services do to a group that they share is serialised
// here.
package bpfprog
