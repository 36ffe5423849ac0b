package bpfprog

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"grm/control"
)

const Root = "/sys/fs/bpf/grm"

var ErrLayout = errors.New("pinned by a grm of another layout")

type Kind uint8

const (
	Flow Kind = iota
	Noop
	CBPF
)

type Assure uint8

const (
	Reply Assure = iota
	Packet
	Explicit
)

type Dissector struct {
	Kind    Kind
	Timeout time.Duration
	Flows   uint32
	Assure  Assure
}

type GroupSpec struct {
	Network   string
	Address   netip.AddrPort
	DualStack bool
	Dissector Dissector
	MaxApps   int
}

type GroupKey struct {
	Network string
	Address netip.AddrPort
}

type Service struct{ Name string }

type Group struct{ Spec GroupSpec }

type Counter int

type Counters [1]uint64

type FlowEntry struct {
	Remote          netip.AddrPort
	App, Bank, Slot int
	Assured         bool
	Answered        bool
	Packets         int
	Idle            time.Duration
}

var errStub = errors.ErrUnsupported

func Mount() error                                                           { return errStub }
func Dir() (string, error)                                                   { return "", errStub }
func OpenService(name string) (*Service, error)                              { return nil, errStub }
func CreateService(name string) (*Service, error)                            { return nil, errStub }
func (s *Service) Control() *control.Map                                     { return nil }
func (s *Service) ControlFD() int                                            { return -1 }
func (s *Service) AttachHooks(cgroup *os.File, groups []*Group) error        { return errStub }
func (s *Service) PruneHooks(inUse func(cgroupID uint64) bool) error         { return errStub }
func (s *Service) Remove() error                                             { return errStub }
func (s *Service) Close() error                                              { return nil }
func OpenGroup(network string, addr netip.AddrPort) (*Group, error)          { return nil, errStub }
func CreateGroup(spec GroupSpec) (*Group, error)                             { return nil, errStub }
func (g *Group) Matches(spec GroupSpec) error                                { return errStub }
func (g *Group) Refresh() (bool, error)                                      { return false, errStub }
func (g *Group) Join(app int, s *Service) error                              { return errStub }
func (g *Group) Attach(sock int) error                                       { return errStub }
func (g *Group) SetBank(app, bank int, generation uint64, sockets int) error { return errStub }
func (g *Group) Put(app, bank, index, sock int) error                        { return errStub }
func (g *Group) Slots(app, bank int) ([]uint64, error)                       { return nil, errStub }
func (g *Group) Clear(app, bank int) error                                   { return errStub }
func (g *Group) FlowsFD() (int, bool)                                        { return -1, false }
func (g *Group) Counters() (Counters, error)                                 { return Counters{}, errStub }
func (g *Group) Flows(yield func(FlowEntry) bool) error                      { return errStub }
func (g *Group) Remove() error                                               { return errStub }
func (g *Group) Close() error                                                { return nil }
func Groups() ([]GroupKey, error)                                            { return nil, errStub }
func Services() ([]string, error)                                            { return nil, errStub }
func (c Counter) String() string                                             { return "" }
