package stories

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"testing"

	"grm/test/box"
	"grm/test/load"
)

// byApp is the dissector that two services share: the first byte of a payload is 255 if the next two are a cookie, else the app's number.
const byApp = `["48 0 0 0", "21 2 0 255", "68 0 0 2147483648", "22 0 0 0", "40 0 0 1", "22 0 0 0"]`

// testServer is test/server in a box.
const testServer = "/usr/lib/grm/test/server"

// appEcho is load.Echo behind those three bytes, as servers with the habit "cookies" answer it: a flow begins with its app, and goes on with
// the cookie that the last answer told. A load's one goroutine has it.
type appEcho struct {
	load.Echo
	app     byte
	cookies map[uint64]uint16 // by flow
}

func (p appEcho) Request(buf []byte, d load.Datagram, size int) []byte {
	head := []byte{p.app, 0, 0}
	if cookie, known := p.cookies[d.Flow]; known {
		head = binary.BigEndian.AppendUint16([]byte{255}, cookie)
	}
	buf = append(buf, head...)
	return append(buf, p.Echo.Request(nil, d, size-len(head))...)
}

func (p appEcho) Answer(packet []byte) (string, load.Datagram, error) {
	name, rest, _ := strings.Cut(string(packet), " ")
	instance, told, _ := strings.Cut(name, ":")
	cookie, err := strconv.ParseUint(told, 10, 16)
	if err != nil || len(rest) < 3 {
		return "", load.Datagram{}, fmt.Errorf("no cookie, or no request, in %q", packet)
	}
	instance, d, err := p.Echo.Answer([]byte(instance + " " + rest[3:]))
	if err == nil {
		p.cookies[d.Flow] = uint16(cookie)
	}
	return instance, d, err
}

// apps are services that share one address, by their number.
type apps struct {
	*story
	services [2]*service
}

// install installs a version of an app's service: pairs of what is in the usual one and what is to be there instead.
func (a *apps) install(app int, oldnew ...string) {
	a.Helper()
	change := append(quickly("1s"), has("cookies")...)
	change = append(change, `timeout = "1m"`, `timeout = "10m"`, // its flows end before that, however long the story takes
		`name = "echo"`, fmt.Sprintf(`name = "app%d"`, app), "grm-echo", fmt.Sprintf("grm-app%d", app),
		"[[listen]]\n", fmt.Sprintf("[[listen]]\napp = %d\nmax_apps = 2\ndissector = \"cbpf\"\nprogram = %s\n", app, byApp))
	a.services[app] = a.story.install("echo", append(change, oldnew...)...)
}

// load starts a load on an app: half the usual one, since there are two.
func (a *apps) load(app int, change ...func(*load.Options)) *driver {
	a.Helper()
	return a.services[app].load(append([]func(*load.Options){func(o *load.Options) {
		o.Protocol, o.Flows, o.Length = appEcho{app: byte(app), cookies: map[uint64]uint16{}}, 100, 40
	}}, change...)...)
}

// standing is what an app's service must keep, whatever happens to the other.
type standing struct {
	generation uint64
	instance   string
}

func (a *apps) standing(app int) standing {
	a.Helper()
	generation, _ := a.status(app)
	return standing{generation, a.services[app].instance()}
}

// status is what grm says of an app's service: the generation that takes new flows, and the counters of the address.
func (a *apps) status(app int) (working uint64, counters map[string]uint64) {
	a.Helper()
	out, err := a.Exec(box.BinDir+"/grm", "status", "--json", a.services[app].Name)
	a.must(err)
	var r struct {
		Services []struct{ Working uint64 }
		Groups   []struct{ Counters map[string]uint64 }
		Problems []string
	}
	a.must(json.Unmarshal([]byte(out), &r))
	if len(r.Groups) != 1 || len(r.Services) != 1 || len(r.Problems) != 0 {
		a.Fatalf("not one group and one service: %s", out)
	}
	return r.Services[0].Working, r.Groups[0].Counters
}

// onlyAt fails the story unless all answers came from these instances, and some from each.
func (a *apps) onlyAt(r load.Result, instances ...string) {
	a.Helper()
	others := maps.Clone(r.Instances)
	for _, i := range instances {
		if others[i].Answers == 0 {
			a.Errorf("instance %s answered nothing: %v", i, r)
		}
		delete(others, i)
	}
	if len(others) != 0 {
		a.Errorf("others than %q answered: %v", instances, r)
	}
}

// TestTwoAppsOneAddress has two services of two users behind one address. Whatever happens to one, the other's flows, instance and generation
// stay what they are.
func TestTwoAppsOneAddress(t *testing.T) {
	a := apps{story: newOdd(t)}
	few := func(o *load.Options) { o.Flows, o.Seed = 20, 2 }
	var loads, lasting [2]*driver // flows that end, and some that do not
	var instances [2][]string
	for app := range a.services {
		a.install(app)
		a.services[app].start()
	}
	zero, one := a.services[0], a.services[1]
	if zero.User == one.User {
		t.Fatal("both have one user")
	}
	for app, v := range a.services {
		loads[app], lasting[app] = a.load(app), a.load(app, forever, few)
		instances[app] = []string{v.instance()}
	}
	restarted := func(app int) {
		t.Helper()
		instances[app] = append(instances[app], a.services[app].instance())
		loads[app].newFlowsAt(a.services[app].instance(), 50)
	}

	// Each is restarted on its own, then both at a time.
	for range 2 {
		for app, v := range a.services {
			before := a.standing(1 - app)
			v.restart()
			restarted(app)
			loads[1-app].more(500)
			if now := a.standing(1 - app); now != before {
				t.Errorf("a restart of app %d changed the other from %v to %v", app, before, now)
			}
		}
	}
	_, err := a.Systemctl("restart", zero.Unit, one.Unit)
	a.must(err)
	restarted(0)
	restarted(1)

	// New versions of app 1 fail: one before it is ready, one within its watch.
	before := a.standing(0)
	serving := one.instance()
	a.install(1, strconv.Quote(testServer)+`, "cookies"`, `"/bin/false"`)
	if _, err := one.Restart(); err == nil {
		t.Error("the restart did not fail")
	}
	one.statusHas("gen 4 serving", "gen 5 failed")
	loads[1].more(1000)
	if now := one.instance(); now != serving {
		t.Errorf("instance %s serves app 1, not %s", now, serving)
	}
	a.install(1, "[watch]\n", "[watch]\nprobe = [\"/bin/false\"]\n", `time = "1s"`, `time = "1h"`)
	one.restart()
	one.statusHas("gen 4 serving", "gen 6 failed")
	a.onlyAt(a.load(1).end(), serving)
	loads[0].more(500)
	if now := a.standing(0); now != before {
		t.Errorf("failures of app 1 changed app 0 from %v to %v", before, now)
	}

	// App 1 stops: what was under way is lost as in any stop, and from then on app 0 serves its flows.
	a.install(1)
	if r := lasting[1].end(); len(r.Instances) != 1 {
		t.Errorf("flows of app 1 began at one instance and live: %v", r)
	}
	_, counters := a.status(0)
	if n := counters["app_gone"]; n != 0 {
		t.Errorf("%d packets for an app without a service, while both served", n)
	}
	for name := range loads[1].Snapshot().Instances {
		loads[1].Gone(name)
	}
	loads[1].Mark("stop")
	a.must(one.Stop())
	one.active("inactive")
	loads[1].Mark("stopped")
	loads[1].newFlowsAt(zero.instance(), 50)
	heirs := a.load(1, forever, few)
	r := loads[1].stop()
	for _, w := range r.Windows {
		if w.Lost != 0 && w.Name != "stop" || w.Moved+w.Duplicated != 0 {
			a.counters()
			t.Errorf("%s of app 1: %v", w.Name, r)
		}
	}
	if _, counters := a.status(0); counters["app_gone"] < 50 {
		t.Errorf("%d packets for an app without a service are counted", counters["app_gone"])
	}
	if out, err := a.Exec(box.BinDir+"/grm", "status", zero.Name); err != nil || !strings.Contains(out, "app 0 of 2; app 0 got ") {
		t.Errorf("grm status does not say who got the packets for app 1 (%v):\n%s", err, out)
	}
	if now := a.standing(0); now != before {
		t.Errorf("the stop of app 1 changed app 0 from %v to %v", before, now)
	}

	// App 1 starts again: new flows are its own, and those that app 0 has got stay there.
	one.start()
	loads[1] = a.load(1)
	heirs.more(500)
	a.onlyAt(heirs.end(), zero.instance())
	one.restart()
	loads[1].newFlowsAt(one.instance(), 50)

	// App 0 stops: nobody takes its flows, and those of app 1 go on.
	if r := lasting[0].end(); len(r.Instances) != 1 {
		t.Errorf("flows of app 0 began at one instance and live: %v", r)
	}
	a.onlyAt(loads[0].end(), instances[0]...)
	last := zero.instance()
	a.must(zero.Stop())
	zero.active("inactive")
	_, counters = a.status(1)
	if _, err := a.Exec(testServer, "ask", zero.Targets()[0].String()); err == nil {
		t.Error("somebody answered for app 0")
	}
	if _, now := a.status(1); now["dropped_closing"] != counters["dropped_closing"]+1 {
		t.Errorf("%d packets were dropped, then %d", counters["dropped_closing"], now["dropped_closing"])
	}
	loads[1].more(500)
	r = loads[1].end()
	if r.Instances[last].Answers != 0 || len(r.Instances) != 2 {
		t.Errorf("app 1 serves its flows itself again: %v", r)
	}
	a.must(one.Stop())
	a.nothingLeft(zero, one)
	if files, err := a.Tree("/run/grm"); err != nil || len(files) != 0 {
		t.Errorf("files are left in /run/grm: %q, %v", files, err)
	}
}
