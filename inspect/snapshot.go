package inspect

import (
	"errors"
	"fmt"
	"io/fs"

	"grm/bpfprog"
	"grm/bpfprog/model"
	"grm/config"
)

// ErrNone says that there is no such service or group.
var ErrNone = errors.New("there is nothing of that name in this network namespace (grm list shows what there is)")

// OpenGroup opens a group by its name, such as udp://0.0.0.0:5201. It fails
// with ErrNone if there is no such group.
func OpenGroup(name string) (*bpfprog.Group, error) {
	var address config.Address
	if err := address.UnmarshalText([]byte(name)); err != nil {
		return nil, fmt.Errorf("group %s: %w", name, err)
	}
	g, err := bpfprog.OpenGroup(string(address.Proto), address.AddrPort)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("group %s: %w", name, ErrNone)
	}
	return g, err
}

// Snapshot is a group's state at this moment, for the model of its program.
func Snapshot(name string) (*model.State, error) {
	g, err := OpenGroup(name)
	if err != nil {
		return nil, err
	}
	s, err := g.State()
	return s, errors.Join(err, g.Close())
}
