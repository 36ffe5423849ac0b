// Package flowtable reads a group's flow table through mmap(2): no bpf(2), no
// privilege but the descriptor, and little memory, because a chunk is mapped
// at a time.
//
// The layout is bpfprog/c/flow.h: an array of buckets of eight ways, and after
// the last one a bucket that is user space's own, the header.
package flowtable

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/fdinfo"
)

const (
	Magic  = 0x464d5247 // "GRMF"
	Layout = 1          // grows when the meaning or the place of anything in a bucket changes

	Ways       = 8
	BucketSize = 256
	Young      = 10 // stamps that an entry lives unless it is assured and has seen some packets

	// Unit is what stamps count: the coarse monotonic clock >> 30.
	Unit = time.Duration(1 << 30)

	busyOrTentative = 1 << 31
	assured         = 1 << 30
	grown           = 1 << 29
	stampBits       = 1<<29 - 1
	answered        = 1 << 16
	chunk           = 256 << 10
)

// ErrLayout says that a table was made by a version of grm with another layout.
var ErrLayout = errors.New("flow table has another layout")

type bucket struct {
	word    [Ways]uint64 // home | fingerprint << 32
	last    [Ways]uint32
	info    [Ways]uint32
	address [Ways][16]byte
}

// Header is the bucket after the last one that keys have.
type Header struct {
	Magic   uint32
	Layout  uint32
	Timeout uint32                // stamps that an assured flow lives which is not young
	Tag     [control.Banks]uint16 // of app 0's banks as they are now; a flow with another tag is gone
	_       [BucketSize - 12 - 2*control.Banks]byte
}

// Buckets is how many buckets a table for that many flows has, without the
// header: it has twice as many ways as flows, and a power of two of buckets.
func Buckets(flows uint32) uint32 {
	buckets := uint32(2)
	for uint64(buckets)*Ways < 2*uint64(flows) {
		buckets *= 2
	}
	return buckets
}

// Stamps is d in the unit of stamps, rounded up.
func Stamps(d time.Duration) uint32 { return uint32((d + Unit - 1) / Unit) }

// MarshalHeader is the header as the map's element.
func MarshalHeader(h Header) []byte {
	return append([]byte(nil), (*[BucketSize]byte)(unsafe.Pointer(&h))[:]...)
}

// Entry is one flow that is alive.
type Entry struct {
	Remote          netip.AddrPort
	App, Bank, Slot int
	Tag             uint16 // of its bank when the flow came
	Assured         bool
	Answered        bool
	Packets         int           // of the client, counted up to 3
	Idle            time.Duration // since the client's last packet, to about a second
}

// Count tells how many live assured flows each bank has. It is for those who
// have a table because no other app is in it; see FlowsFD in package bpfprog.
func Count(fd int) (perBank [control.Banks]int, err error) {
	err = walk(fd, func(h *Header, b *bucket, way int, now uint32) bool {
		last := atomic.LoadUint32(&b.last[way])
		if last&assured != 0 && live(h, last, now) {
			if home := uint32(atomic.LoadUint64(&b.word[way])); h.current(home) {
				perBank[home>>8&31]++
			}
		}
		return true
	})
	return perBank, err
}

// Each calls yield with each live flow until it returns false. The table goes
// on changing meanwhile: a flow that comes or goes may be seen or not.
func Each(fd int, yield func(Entry) bool) error {
	return walk(fd, func(h *Header, b *bucket, way int, now uint32) bool {
		e, ok := b.entry(h, way, now)
		return !ok || yield(e)
	})
}

// entry is the flow in a way, if there is a live one.
func (b *bucket) entry(h *Header, way int, now uint32) (Entry, bool) {
	last := atomic.LoadUint32(&b.last[way])
	if !live(h, last, now) {
		return Entry{}, false
	}
	word := atomic.LoadUint64(&b.word[way])
	info := atomic.LoadUint32(&b.info[way])
	address := b.address[way]
	if atomic.LoadUint32(&b.last[way])&busyOrTentative != 0 || atomic.LoadUint64(&b.word[way]) != word {
		return Entry{}, false // given to another flow at this moment
	}
	home := uint32(word)
	if !h.current(home) {
		return Entry{}, false
	}
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], uint16(info))
	return Entry{
		Remote:   netip.AddrPortFrom(netip.AddrFrom16(address).Unmap(), binary.BigEndian.Uint16(port[:])),
		App:      int(home >> 13 & 15),
		Bank:     int(home >> 8 & 31),
		Slot:     int(home & 255),
		Tag:      uint16(home >> 17),
		Assured:  last&assured != 0,
		Answered: info&answered != 0,
		Packets:  int(info >> 24),
		Idle:     time.Duration(max(age(last, now), 0)) * Unit,
	}, true
}

// age is in stamps; a flow's may be one ahead of the reader's.
func age(last, now uint32) int32 { return int32(now - last&stampBits) }

func live(h *Header, last, now uint32) bool {
	if last == 0 || last&busyOrTentative != 0 {
		return false
	}
	life := uint32(Young)
	if last&(assured|grown) == assured|grown {
		life = h.Timeout
	}
	return age(last, now) <= int32(life)
}

// current says whether home's bank still belongs to the generation that it
// named. Of the apps but the first, the header knows nothing.
func (h *Header) current(home uint32) bool {
	return home>>13&15 != 0 || uint32(h.Tag[home>>8&31]) == home>>17
}

// walk calls yield with every way of the table.
func walk(fd int, yield func(h *Header, b *bucket, way int, now uint32) bool) error {
	buckets, err := buckets(fd)
	if err != nil {
		return fmt.Errorf("flow table: %w", err)
	}
	h, err := ReadHeader(fd)
	if err != nil {
		return err
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts); err != nil {
		return fmt.Errorf("flow table: clock_gettime: %w", err)
	}
	now := uint32(ts.Nano() >> 30)
	for at := 0; at < buckets*BucketSize; at += chunk {
		size := min(chunk, buckets*BucketSize-at)
		more, err := walkChunk(fd, at, size, func(b *bucket, way int) bool { return yield(&h, b, way, now) })
		if err != nil || !more {
			return err
		}
	}
	return nil
}

func walkChunk(fd, at, size int, yield func(b *bucket, way int) bool) (more bool, err error) {
	mem, err := unix.Mmap(fd, int64(at), size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return false, fmt.Errorf("map flow table at %d: %w", at, err)
	}
	defer func() { _ = unix.Munmap(mem) }() // our own whole mapping: it cannot fail
	for off := 0; off < size; off += BucketSize {
		b := (*bucket)(unsafe.Pointer(&mem[off]))
		for way := range Ways {
			if !yield(b, way) {
				return false, nil
			}
		}
	}
	return true, nil
}

// ReadHeader reads the header of the table behind fd.
func ReadHeader(fd int) (Header, error) {
	var h Header
	err := withHeader(fd, unix.PROT_READ, func(mapped *Header) {
		h.Magic, h.Layout, h.Timeout = mapped.Magic, mapped.Layout, mapped.Timeout
		h.Tag = mapped.Tag
	})
	if err == nil && (h.Magic != Magic || h.Layout != Layout) {
		err = fmt.Errorf("%w: magic %#x, layout %d; this grm has layout %d", ErrLayout, h.Magic, h.Layout, Layout)
	}
	return h, err
}

// SetTag says which tag bank's flows have from now on. fd must be writable.
func SetTag(fd, bank int, tag uint16) error {
	return withHeader(fd, unix.PROT_READ|unix.PROT_WRITE, func(h *Header) { h.Tag[bank] = tag })
}

func withHeader(fd, prot int, do func(*Header)) error {
	buckets, err := buckets(fd)
	if err != nil {
		return fmt.Errorf("flow table: %w", err)
	}
	page := os.Getpagesize()
	at := buckets * BucketSize
	mem, err := unix.Mmap(fd, int64(at&^(page-1)), at&(page-1)+BucketSize, prot, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map flow table's header: %w", err)
	}
	do((*Header)(unsafe.Pointer(&mem[at&(page-1)])))
	return unix.Munmap(mem)
}

// buckets is how many buckets the map behind fd has without the header.
func buckets(fd int) (int, error) {
	info, err := fdinfo.Read(fd)
	if err != nil {
		return 0, err
	}
	if info.ValueSize != BucketSize || info.MaxEntries < 3 || info.MaxEntries > 1<<24 {
		return 0, fmt.Errorf("%w: %d elements of %d bytes", ErrLayout, info.MaxEntries, info.ValueSize)
	}
	return info.MaxEntries - 1, nil
}
