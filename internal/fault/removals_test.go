package fault_test

import (
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"idempotent-orders/internal/fault"
	"idempotent-orders/internal/testenv"
)

// caught names, for each device, the test of the ordinary suite that turns red without it, and what that says.
var caught = map[fault.Removal]struct{ pkg, test, says string }{
	fault.UniqueKey:         {"order", "TestALoserReplaysTheWinner", "orders has 3 rows, <nil>; want 1"},
	fault.TokenCheck:        {"idempotency", "TestAKeyIsReservedByOneHolderUntilItLetsGo", `after a release by who has it not: "reserved"; want "in_progress"`},
	fault.Turn:              {"worker", "TestWhileOneRelayHasTheTurnAnotherPublishesNothing", "one relay has the turn, and another published 1, <nil>; want 0"},
	fault.MaterializedClaim: {"worker", "TestTheRelayPublishesInTheOrderOfTheOutbox", "the relay published 1003, <nil>; want 1000"},
	fault.FloorHorizon:      {"worker", "TestALowIDThatCommitsLateIsPublished", "the low id is committed, and the relay published 0, <nil>; want 1"},
	fault.Inbox:             {"worker", "TestAnEventThatIsDeliveredAgainAfterItsMailIsNotMailedAgain", "4 mails were sent for 2 orders"},
	fault.CommitLookUp:      {"order", "TestALostCommitIsLookedUp", "the order was committed, and Place returned place orders: PostgreSQL is unavailable: unexpected EOF"},
	fault.Fingerprint:       {"order", "TestALoserReplaysTheWinner", "another amount under the key got a replay of the first order; want ErrMismatch"},
}

func TestEachDeviceThatIsRemovedIsMissed(t *testing.T) {
	t.Parallel()
	binaries := map[string]string{}
	for _, removal := range fault.Removals() {
		by, ok := caught[removal]
		if !ok {
			t.Fatalf("no test is named that misses %s", removal)
		}
		if binaries[by.pkg] == "" {
			binaries[by.pkg] = buildTests(t, by.pkg)
			passWithEverything(t, binaries[by.pkg], by.pkg)
		}
		t.Run(string(removal), func(t *testing.T) {
			output, err := runTests(t, binaries[by.pkg], by.pkg, by.test, removal)
			var exit *exec.ExitError
			switch {
			case !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(output, "--- FAIL: "+by.test+" "):
				t.Errorf("without %s, %s does not fail: %v\n%s", removal, by.test, err, output)
			case !strings.Contains(output, by.says):
				t.Errorf("without %s, %s fails, but does not say %q:\n%s", removal, by.test, by.says, output)
			default:
				t.Logf("caught by %s.%s: %s", by.pkg, by.test, by.says)
			}
		})
	}
}

// buildTests builds the tests of a package with the faults.
func buildTests(t *testing.T, pkg string) (binary string) {
	t.Helper()
	binary = filepath.Join(testenv.Dir(t), pkg+".test")
	output, err := exec.CommandContext(t.Context(), "go", "test", "-tags=faults", "-c", "-o", binary, "idempotent-orders/"+pkg).CombinedOutput()
	if err != nil {
		t.Fatalf("build the tests of %s: %v\n%s", pkg, err, output)
	}
	return binary
}

// passWithEverything checks that the named tests of a package pass while nothing is removed.
func passWithEverything(t *testing.T, binary, pkg string) {
	t.Helper()
	named := map[string]bool{}
	for _, by := range caught {
		if by.pkg == pkg {
			named[by.test] = true
		}
	}
	output, err := runTests(t, binary, pkg, strings.Join(slices.Sorted(maps.Keys(named)), "|"), "")
	if err != nil {
		t.Fatalf("with everything in place: %v\n%s", err, output)
	}
	for test := range named {
		if !strings.Contains(output, "--- PASS: "+test+" ") {
			t.Fatalf("with everything in place, %s did not pass:\n%s", test, output)
		}
	}
}

// runTests runs tests in the folder of their package.
func runTests(t *testing.T, binary, pkg, tests string, remove fault.Removal) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.v", "-test.run=^("+tests+")$", "-test.timeout=100s")
	cmd.Dir = filepath.Join("..", "..", pkg)
	cmd.Env = append(os.Environ(), "REMOVE="+string(remove))
	output, err := cmd.CombinedOutput()
	return string(output), err
}
