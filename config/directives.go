package config

import (
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
)

// fdsOfItsOwn is what the fd store holds besides sockets and flow tables, at most: the control map, a link to the keeper
// of each of 32 generations, and 15 that are the server's.
const fdsOfItsOwn = 48

// FileDescriptorStoreMax is the least size of the fd store of a service with so many listeners: two generations of each
// at their largest, because the old and the new one are in it together for a moment, its flow table, and the few others.
func FileDescriptorStoreMax(listeners int) int {
	return listeners*(2*MaxSockets+1) + fdsOfItsOwn
}

// guard is why a directive is not for the pass-through. A guard without allow refuses every value.
type guard struct {
	why   string // completes "the mechanism needs it: …"
	hint  string
	allow func(values []string, s *Service) bool
}

const generated = "leave it out: grm-unitgen writes it"

// guards are the directives that restarts without loss depend on, and those that have a key of their own, by section.
var guards = map[string]map[string]guard{
	"Unit": {
		"Description":           {why: "it has a key of its own", hint: "set description"},
		"StartLimitIntervalSec": {why: "with a start limit the fifth restart within its time is refused after the stop, and the sockets are lost", hint: generated},
		"StartLimitInterval":    {why: "with a start limit the fifth restart within its time is refused after the stop, and the sockets are lost", hint: generated},
		"StartLimitBurst":       {why: "with a start limit the fifth restart within its time is refused after the stop, and the sockets are lost", hint: generated},
	},
	"Service": {
		"Type":                        {why: "a restart has succeeded only when the new instance serves, which the decoy tells by READY=1", hint: generated},
		"ExitType":                    {why: "the service ends with the decoy, though draining instances go on", hint: generated},
		"RemainAfterExit":             {why: "a service whose decoy has ended must be started again", hint: generated},
		"NotifyAccess":                {why: "sockets are stored by ExecStartPre, readiness is told by the decoy", hint: generated},
		"ExecStart":                   {why: "it starts the decoy", hint: "set exec"},
		"ExecStop":                    {why: "it tells the decoy whether this is a restart or a stop", hint: "use drain.signal and drain.stop_signal to tell the server"},
		"ExecStopPost":                {why: "it ends what a stop or a failed start leaves behind", hint: generated},
		"ExecStartPre":                {why: "an empty value would remove grm-activate too", hint: "write the command", allow: notEmpty},
		"KillMode":                    {why: "a restart must end the decoy only, not the old server", hint: generated},
		"KillSignal":                  {why: "the decoy expects SIGTERM", hint: "set drain.stop_signal for the server"},
		"RestartKillSignal":           {why: "the decoy expects SIGTERM", hint: "set drain.stop_signal for the server"},
		"SendSIGKILL":                 {why: "a decoy that hangs must end", hint: generated},
		"Restart":                     {why: "systemd drops the stored sockets when a start fails and none follows", hint: generated},
		"RestartSec":                  {why: "a stop during that wait runs none of grm's commands and would leave instances behind", hint: "leave it out: the back-off is in grm-activate"},
		"RestartSteps":                {why: "a stop during that wait runs none of grm's commands and would leave instances behind", hint: "leave it out: the back-off is in grm-activate"},
		"RestartMaxDelaySec":          {why: "a stop during that wait runs none of grm's commands and would leave instances behind", hint: "leave it out: the back-off is in grm-activate"},
		"RestartMode":                 {why: "ExecStopPost must run between two starts", hint: generated},
		"RestartPreventExitStatus":    {why: "systemd drops the stored sockets when a start fails and none follows", hint: generated},
		"RestartForceExitStatus":      {why: "every exit is followed by a start anyway", hint: generated},
		"StartLimitInterval":          {why: "with a start limit the fifth restart within its time is refused after the stop, and the sockets are lost", hint: generated},
		"StartLimitBurst":             {why: "with a start limit the fifth restart within its time is refused after the stop, and the sockets are lost", hint: generated},
		"OOMPolicy":                   {why: "an OOM kill of a draining instance must not stop the service", hint: generated},
		"FileDescriptorStoreMax":      {why: "old and new sockets are in the store together", hint: "leave it out, or write a larger number", allow: storeIsLargeEnough},
		"FileDescriptorStorePreserve": {why: "sockets that outlive a stop would take packets that nobody reads", hint: generated},
		"TimeoutStartSec":             {why: "it must cover readiness and back-off", hint: "set ready.timeout"},
		"TimeoutSec":                  {why: "it must cover readiness and back-off", hint: "set ready.timeout, and TimeoutStopSec here"},
		"User":                        {why: "it has a key of its own", hint: "set user"},
		"Group":                       {why: "it has a key of its own", hint: "set group"},
		"DynamicUser":                 {why: "it brings PrivateTmp=, and all sockets of an address need one user for ever", hint: "set user", allow: isNo},
		"WorkingDirectory":            {why: "it has a key of its own", hint: "set working_directory"},
		"Environment":                 {why: "it has a key of its own", hint: "write it into [environment]"},
		"RuntimeDirectory":            {why: "keepers leave notes in the directory of the service's name", hint: "name that directory too, beside others", allow: keepsRuntimeDirectory},
		"RuntimeDirectoryPreserve":    {why: "a restart must not remove the directory of a draining instance", hint: generated},
		"PrivateTmp":                  {why: "a restart would empty /tmp under a draining instance", hint: "leave it out: TemporaryFileSystem= gives each instance a /tmp of its own", allow: isNo},
		"PrivateNetwork":              {why: "grm-activate would bind the sockets inside, where no packet comes", hint: "leave it out, or use NetworkNamespacePath=", allow: isNo},
		"Delegate":                    {why: "a service's processes are found by its cgroup, which must not be divided", hint: "leave it out", allow: isNo},
	},
}

func notEmpty(values []string, _ *Service) bool {
	return len(values) > 0 && !slices.Contains(values, "")
}

func isNo(values []string, _ *Service) bool {
	return !slices.ContainsFunc(values, func(v string) bool {
		return !slices.Contains([]string{"no", "false", "off", "n", "f", "0"}, strings.ToLower(v))
	})
}

func storeIsLargeEnough(values []string, s *Service) bool {
	if len(values) != 1 {
		return false
	}
	n, err := strconv.Atoi(values[0])
	return err == nil && n >= FileDescriptorStoreMax(len(s.Listen)) && n <= math.MaxInt32
}

func keepsRuntimeDirectory(values []string, s *Service) bool {
	return slices.Contains(strings.Fields(strings.Join(values, " ")), s.Name) && !slices.Contains(values, "")
}

// checkDirective tells whether a directive may be handed through.
func checkDirective(section, key string, values []string, s *Service) error {
	for i := range len(key) {
		if !isBare(key[i]) || key[i] == '_' {
			return problemf("write it as systemd.directives(7) does", "%s is not a directive's name", quote(key))
		}
	}
	if key == "" {
		return problemf("write it as systemd.directives(7) does", "a directive's name is empty")
	}
	g, ok := guards[section][key]
	if !ok || g.allow != nil && g.allow(values, s) {
		return nil
	}
	why := g.why
	if key == "FileDescriptorStoreMax" {
		why += fmt.Sprintf(", %d at least", FileDescriptorStoreMax(len(s.Listen)))
	}
	return problemf(g.hint, "[%s] %s= is not free: %s", section, key, why)
}

// checkServiceName is CheckName without the names that are taken.
func checkServiceName(name string) error {
	if name == "grm" {
		return problemf("choose another", "the name %q is taken: /run/grm is grm's own", name)
	}
	return CheckName(name)
}

// checkUser tells whether a text can be the name or the number of a user or a group.
func checkUser(s string) error {
	const hint = `write a name such as "myserver", or a number`
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		// The two are "no user" for the kernel, in 32 and in the old 16 bits.
		if n >= math.MaxUint32 || n == math.MaxUint16 {
			return problemf(hint, "%s is not a number that a user can have", s)
		}
		return nil
	}
	if s == "" {
		return problemf(hint, "empty")
	}
	if len(s) > 31 {
		return problemf(hint, "%s is longer than 31 bytes", quote(s))
	}
	for i := range len(s) {
		c := s[i]
		if !isBare(c) && c != '.' || i == 0 && (c == '-' || c == '.' || c >= '0' && c <= '9') {
			return problemf(hint, "%s is not a name that a user can have", quote(s))
		}
	}
	return nil
}

// notForServers are variables that systemd or grm set for each instance; a fixed value would be wrong for all but one.
var notForServers = []string{"NOTIFY_SOCKET", "MAINPID", "WATCHDOG_*", "LISTEN_*", "GRM_*"}

// checkEnvironment tells whether a variable can be in Environment=.
func checkEnvironment(name, value string) error {
	for i := range len(name) {
		if c := name[i]; !isBare(c) || c == '-' || i == 0 && c >= '0' && c <= '9' {
			return problemf("use letters, digits and _", "%s is not a variable's name", quote(name))
		}
	}
	if name == "" {
		return problemf("use letters, digits and _", "a variable's name is empty")
	}
	for _, pattern := range notForServers {
		if ok, _ := path.Match(pattern, name); ok {
			return problemf("leave it out", "%s is set for each instance by systemd and grm", name)
		}
	}
	if len(value) > maxCommand {
		return problemf("put it into a file", "%d bytes are more than %d", len(value), maxCommand)
	}
	// systemd takes these two control characters, and no others.
	if i := strings.IndexFunc(value, func(r rune) bool { return (r < ' ' || r == 0x7F) && r != '\n' && r != '\t' }); i >= 0 {
		return problemf("leave it out: systemd refuses it", "control character %U at byte %d of %s", value[i], i+1, quote(value))
	}
	return checkUnicode(value)
}
