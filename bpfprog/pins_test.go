package bpfprog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"testing"
)

// The directories above pins go with the last pin in them, whoever makes
// others at that moment.
func TestNothingIsLeft(t *testing.T) {
	needRoot(t)
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			for range 20 {
				s, err := CreateService(fmt.Sprint("tidy", i))
				if err != nil {
					t.Error(err)
					return
				}
				if err := errors.Join(s.Remove(), s.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if _, err := os.Stat(Root); !errors.Is(err, fs.ErrNotExist) {
		left, _ := Services()
		t.Errorf("%s is left, with services %q: %v", Root, left, err)
	}
}
