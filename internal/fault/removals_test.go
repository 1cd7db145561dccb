package fault_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"idempotent-orders/internal/fault"
	"idempotent-orders/internal/testenv"
)

// caught names, for each device, the test of the ordinary suite that turns red without it.
var caught = map[fault.Removal]struct{ pkg, test string }{
	fault.UniqueKey:         {"order", "TestALoserReplaysTheWinner"},
	fault.TokenCheck:        {"idempotency", "TestAKeyIsReservedByOneHolderUntilItLetsGo"},
	fault.Turn:              {"worker", "TestWhileOneRelayHasTheTurnAnotherPublishesNothing"},
	fault.MaterializedClaim: {"worker", "TestTheRelayPublishesInTheOrderOfTheOutbox"},
	fault.FloorHorizon:      {"worker", "TestALowIDThatCommitsLateIsPublished"},
	fault.Inbox:             {"worker", "TestAnEventThatIsDeliveredAgainAfterItsMailIsNotMailedAgain"},
	fault.CommitLookUp:      {"order", "TestALostCommitIsLookedUp"},
	fault.Fingerprint:       {"order", "TestALoserReplaysTheWinner"},
}

func TestEachDeviceThatIsRemovedIsMissed(t *testing.T) {
	t.Parallel()
	dir := testenv.Dir(t)
	binaries := map[string]string{}
	for _, removal := range fault.Removals() {
		by, ok := caught[removal]
		if !ok {
			t.Fatalf("no test is named that misses %s", removal)
		}
		binary, ok := binaries[by.pkg]
		if !ok {
			binary = filepath.Join(dir, by.pkg+".test")
			output, err := exec.CommandContext(t.Context(), "go", "test", "-tags=faults", "-c", "-o", binary, "idempotent-orders/"+by.pkg).CombinedOutput()
			if err != nil {
				t.Fatalf("build the tests of %s: %v\n%s", by.pkg, err, output)
			}
			binaries[by.pkg] = binary
		}
		t.Run(string(removal), func(t *testing.T) {
			if output, err := runTest(t, binary, by.pkg, by.test, ""); err != nil || !strings.Contains(output, "--- PASS: "+by.test+" ") {
				t.Fatalf("with everything in place: %v\n%s", err, output)
			}
			output, err := runTest(t, binary, by.pkg, by.test, string(removal))
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(output, "--- FAIL: "+by.test+" ") {
				t.Errorf("without %s, %s does not fail: %v\n%s", removal, by.test, err, output)
			}
		})
	}
}

// runTest runs one test in the folder of its package.
func runTest(t *testing.T, binary, pkg, test, remove string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-test.v", "-test.run=^"+test+"$", "-test.timeout=100s")
	cmd.Dir = filepath.Join("..", "..", pkg)
	cmd.Env = append(os.Environ(), "REMOVE="+remove)
	output, err := cmd.CombinedOutput()
	return string(output), err
}
